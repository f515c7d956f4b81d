"""Eight fake CPU devices, no silent rank promotion, and the small things that many tests share."""

import dataclasses
import json
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# many tests compile the same small step: compile it once, for the workers and the commands that tests start as well
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".pytest_cache/xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes most of the time, and is over twice as fast

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dit.config import Config, Data, Model, Objective, Optim, Train
from dit.model import DiT
from dit.vae import VAE
from dit.weights import torch_layout, write_tensors

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """The notebooks first: one worker runs them all, and they take longest."""
    items.sort(key=lambda item: "test_notebooks" not in item.nodeid)


def tiny_model(dtype=jnp.float32, seed=0, **options) -> DiT:
    sizes = dict(input_size=6, patch_size=3, in_channels=2, hidden_size=20, depth=3, num_heads=5, num_classes=7)
    return DiT(**(sizes | options), dtype=dtype, rngs=nnx.Rngs(seed))


def awaken(model: DiT, scale=0.1, seed=1) -> DiT:
    """The model with noise on every parameter, so that no zero hides a fault."""
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)])


def inputs(model: DiT, batch=3, seed=2):
    """x, t, y of a batch."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (batch, model.input_size, model.input_size, model.in_channels))
    return x, jax.random.uniform(keys[1], (batch,), maxval=999.0), jax.random.randint(keys[2], (batch,), 0, model.num_classes + 1)


def tiny_config(**sections) -> Config:
    """A config of seconds on the embedded digits: tiny_config(train=dict(steps=3))."""
    config = Config(
        name="tiny",
        model=Model(hidden_size=20, depth=2, num_heads=5, patch_size=2),
        objective=Objective(num_steps=101, schedule="cosine"),
        data=Data(name="digits", image_size=8, channels=1, num_classes=10, flip=True),
        optim=Optim(learning_rate=1e-3, ema_decay=0.99),
        train=Train(steps=4, batch_size=16, dtype="float32", log_every=1, sample_every=0, checkpoint_every=0, sample_steps=3))
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


TINY = """digits --model.hidden-size 20 --model.depth 2 --model.num-heads 5 --train.batch-size 16 --train.log-every 1
          --train.sample-every 0 --train.sample-steps 3 --objective.num-steps 101 --optim.schedule constant""".split()


@pytest.fixture
def optimised():
    """For a test that runs for longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def refused(capsys):
    """Runs a command, holds it to one line on stderr and exit status 2, and returns that line."""
    def run(main, *argv) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in argv])
        assert stop.value.code == 2
        captured = capsys.readouterr().err.strip()
        assert len(captured.splitlines()) == 1, captured
        return captured

    return run


def largest_difference(a, b) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def write_vae(folder: Path, widths=(8, 8, 12, 16), groups=4, seed=0) -> Path:
    """A folder as diffusers writes one, of a small VAE with random weights, whose names are the published ones."""
    folder.mkdir(parents=True)
    vae = VAE(widths, 1, groups, rngs=nnx.Rngs(seed))
    write_tensors(folder / "diffusion_pytorch_model.safetensors", torch_layout(vae))
    config = {"_class_name": "AutoencoderKL", "block_out_channels": widths, "layers_per_block": 1, "norm_num_groups": groups,
              "latent_channels": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
