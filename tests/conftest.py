"""Eight fake CPU devices, no silent rank promotion, and what many tests share."""

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Container
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# many tests compile the same small step: the cache is shared by the workers and their commands
CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# compiling takes most of the time: less than half of it without optimisations, and a third of that
# by XLA's older emitters of fusions, which jax 0.11 has not any more
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jax").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}  # what runs for longer

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from PIL import Image

import sample
import train
from dit import checkpoint, cli
from dit.config import Config, Data, Model, Objective, Optim, Train, replace
from dit.data import Dataset, open_dataset
from dit.imagenet.tensors import torch_layout, write_tensors
from dit.imagenet.vae import VAE
from dit.model import DiT
from dit.sharding import make_mesh
from dit.state import State, make_objective, make_state

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

SMALL = """--model.hidden-size 20 --model.depth 2 --model.num-heads 5 --model.patch-size 2
    --train.batch-size 16 --train.log-every 1 --train.sample-every 0 --train.sample-steps 3
    --optim.schedule constant""".split()
TINY = ["digits", *SMALL, "--objective.num-steps", "101"]
TINY_FLOW = ["digits_flow", *SMALL]


def pytest_collection_modifyitems(items):
    """The files that take longest first, as one worker runs a file."""
    longest = "notebooks", "hosts", "train", "survive", "data"
    order = {f"test_{name}.py": place for place, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


# Small models and configs


def tiny_model(dtype=jnp.float32, seed=0, **options) -> DiT:
    sizes = dict(
        input_size=6,
        patch_size=3,
        in_channels=2,
        hidden_size=20,
        depth=3,
        num_heads=5,
        num_classes=7,
    )
    return DiT(**(sizes | options), dtype=dtype, rngs=nnx.Rngs(seed))


def awaken(module: nnx.Module, scale=0.1, seed=1) -> nnx.Module:
    """The module with noise on every parameter, so that no zero hides a fault."""
    leaves, tree = jax.tree.flatten(module)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        leaf + scale * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def block_of(model: DiT, i: int) -> nnx.Module:
    """Block i of the stack."""
    return jax.tree.map(lambda leaf: leaf[i], model.blocks)


def inputs(model: DiT, batch=3, seed=2) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, t, y of a batch."""
    x_key, t_key, y_key = jax.random.split(jax.random.key(seed), 3)
    shape = (batch, model.input_size, model.input_size, model.in_channels)
    x = jax.random.normal(x_key, shape)
    t = jax.random.uniform(t_key, (batch,), maxval=999.0)
    y = jax.random.randint(y_key, (batch,), 0, model.num_classes + 1)
    return x, t, y


def tiny_config(**sections) -> Config:
    """A config of seconds on the embedded digits: tiny_config(train=dict(steps=3))."""
    config = Config(
        name="tiny",
        model=Model(hidden_size=20, depth=2, num_heads=5, patch_size=2),
        objective=Objective(num_steps=101, schedule="cosine"),
        data=Data(name="digits", image_size=8, channels=1, num_classes=10, flip=True),
        optim=Optim(learning_rate=1e-3, ema_decay=0.99),
        train=Train(
            steps=4,
            batch_size=16,
            dtype="float32",
            log_every=1,
            sample_every=0,
            checkpoint_every=0,
            sample_steps=3,
        ),
    )
    return replace(config, **sections)


def show_condition(config: Config, brightness: Callable) -> jax.tree_util.Partial:
    """In place of a model: one whose images show their condition, as brightness(y=..., mask=...).

    For configs of a fixed variance, or of flow that predicts x0. Brightness is `[B, H, W, C]` in
    [-1, 1], or broadcasts to it.
    """
    process = make_objective(config)

    def predict(x, t, **condition):
        x0 = jnp.broadcast_to(brightness(**condition), x.shape)
        return x0 if config.objective.name == "flow" else process.pred_eps(x0, x, t)

    return jax.tree_util.Partial(predict)


def equations(jaxpr, *primitives: str) -> list:
    """The equations of a traced computation that are of some primitives, also of its inner ones."""
    found = [e for e in jaxpr.eqns if e.primitive.name in primitives]
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            found += equations(inner, *primitives)
    return found


def largest_difference(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)


# Commands, in this process


def run_train(*argv):
    """What `python train.py *argv` does. Returns the last state of a run."""
    with cli.exit_status("train.py"):
        return train.run(train.parse([str(a) for a in argv]))


def run_sample(*argv):
    """What `python sample.py *argv` does."""
    with cli.exit_status("sample.py"):
        options = cli.parse(sample.Sample, [str(a) for a in argv], "sample.py", sample.__doc__)
        return sample.run(options)


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs a command, expects one line on stderr and exit status 2, and returns that line."""

    def run(command: Callable, *argv) -> str:
        capsys.readouterr()  # what was printed before
        with pytest.raises(SystemExit) as stop:
            command(*[str(a) for a in argv])
        assert stop.value.code == 2
        line = capsys.readouterr().err.strip()
        assert len(line.splitlines()) == 1, line
        return line

    return run


class Time:
    """A clock that tests set."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def time(monkeypatch) -> Time:
    return Time(monkeypatch)


# Runs and their checkpoints

STEPS = [10, 20]


def run_config(workdir: Path, **train) -> Config:
    return tiny_config(train=dict(workdir=str(workdir), **train))


def awake_state(config: Config) -> State:
    """A state whose model, average and optimizer all differ."""
    state = make_state(config, make_mesh(config))
    placements = jax.tree.map(lambda leaf: leaf.sharding, state)
    state = jax.device_put(state, jax.devices()[0])
    awake = dataclasses.replace(
        state,
        model=awaken(state.model),
        emas=tuple(awaken(state.model, seed=9 + i) for i in range(len(state.emas))),
        opt_state=jax.tree.map(lambda leaf: leaf + 3, state.opt_state),
    )
    return jax.device_put(awake, placements)


def at_step(state: State, step: int) -> State:
    return dataclasses.replace(state, step=jnp.full_like(state.step, step))


def save_steps(config: Config, state: State, steps: list[int]) -> None:
    with checkpoint.Checkpoints(config, open_dataset(config.data)) as checkpoints:
        for step in steps:
            checkpoints.save(at_step(state, step), {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Config, State]:
    """A workdir with checkpoints 10 and 20, its config, and what both hold but for the step."""
    workdir = tmp_path_factory.mktemp("runs") / "saved"
    config = run_config(workdir)
    state = awake_state(config)
    save_steps(config, state, STEPS)
    return workdir, config, state


@pytest.fixture
def copy(saved, tmp_path) -> tuple[Path, Config]:
    """A copy of the workdir to damage, and its config."""
    workdir = tmp_path / "copy"
    shutil.copytree(saved[0], workdir)
    return workdir, run_config(workdir)


def folder(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / str(step)


def files(workdir: Path) -> dict[str, bytes]:
    paths = sorted(path for path in workdir.rglob("*") if path.is_file())
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def digits() -> Dataset:
    return open_dataset(tiny_config().data)


# Files


class Pictures:
    """A TFDS source of 5x5 pictures; picture i is all of shade i (mod 256), of class i % 3."""

    def __init__(self, count: int, damaged: Container[int] = ()):
        self.count = count
        self.damaged = damaged

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        file = io.BytesIO()
        Image.fromarray(np.full((5, 5), i % 256, np.uint8)).save(file, "PNG")
        image = file.getvalue()
        if i in self.damaged:
            image = image[: len(image) // 2]
        return {"image": image, "label": i % 3, "file_name": f"{i}.png".encode()}

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [self[i] for i in indices]


def write_vae(folder: Path, widths=(8, 8, 12, 16), groups=4, seed=0) -> Path:
    """A folder as diffusers writes one, of a small VAE with random weights."""
    folder.mkdir(parents=True)
    vae = VAE(widths, 1, groups, rngs=nnx.Rngs(seed))
    write_tensors(folder / "diffusion_pytorch_model.safetensors", torch_layout(vae))
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "layers_per_block": 1,
        "norm_num_groups": groups,
        "latent_channels": 4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
