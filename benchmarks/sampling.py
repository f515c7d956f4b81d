"""Times sampling beside diffusers' DiTPipeline: python benchmarks/sampling.py [--presets digits]

Ours is sample.py's sampler. The peer is the pipeline as it comes, eager, with the same random
weights, guidance, number of steps and threads. Neither decodes: a VAE would cost both the same.
The pipeline's null class is 1000, so each preset gets 1,000 classes; and under ddpm it leaves a
learned variance aside for the posterior's. Each measurement has a process of its own, the sides
take turns, and one batch goes before the timed ones, so that no compiling is timed. Flags of a
config's fields change every preset.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from table import Row, make_row, report
from train_step import in_own_process, parse_presets

from dit import cli
from dit.config import Config, PositiveInt, replace, require

if TYPE_CHECKING:  # imported in the processes that measure
    import torch
    from diffusers import DiTPipeline


@dataclass(frozen=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    presets: tuple[str, ...] = ("digits",)  # presets to measure
    sampler: Literal["ddpm", "ddim"] = "ddim"  # sampler of both sides
    steps: PositiveInt = 50  # denoising steps
    guidance: float = 4.0  # guidance scale; 1 is none
    num_samples: PositiveInt = 32  # samples in a batch
    batches: PositiveInt = 1  # batches timed in each measurement
    dtype: Literal["float32", "bfloat16"] | None = None  # type of our products; None: the preset's
    peer_dtypes: tuple[Literal["float32", "bfloat16"], ...] | None = None  # peer types; None: ours
    rounds: PositiveInt = 3  # measurements of each side
    json: str | None = None  # file to append the table's rows to


# In the process that measures


def write_weights(config: Config, folder: Path) -> None:
    """Random weights without a zero, in our layout and in diffusers'."""
    import jax

    from dit import checkpoint
    from dit.imagenet.diffusers import write_diffusers
    from dit.state import make_model

    leaves, tree = jax.tree.flatten(make_model(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [a + 0.02 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    model = jax.tree.unflatten(tree, noisy)
    names = tuple(str(k) for k in range(config.data.num_classes))
    checkpoint.save_weights(folder / "ours", model, config, names)
    write_diffusers(folder / "diffusers", model)


def images_per_second(draw: Callable[[], object], options: Options) -> float:
    draw()  # compiles
    start = time.perf_counter()
    for _ in range(options.batches):
        draw()
    return options.batches * options.num_samples / (time.perf_counter() - start)


def measure_ours(folder: Path, labels: list[int], options: Options) -> tuple[str, float]:
    """The device, and images/s on it."""
    cli.use_compilation_cache()
    import jax

    from dit import checkpoint, generation
    from dit.sharding import local_mesh, replicated

    mesh = local_mesh()
    model, config = checkpoint.load(folder / "ours", sharding=replicated(mesh))
    draw = generation.make_draw(
        config,
        mesh,
        generation.make_condition(labels, config),
        len(labels),
        sampler=options.sampler,
        steps=options.steps,
        guidance=options.guidance,
    )
    return jax.devices()[0].device_kind, images_per_second(lambda: draw(model, None, 0), options)


class NoVAE:
    """In place of the pipeline's VAE: what was sampled, in diffusers' wrapping."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, samples: "torch.Tensor") -> SimpleNamespace:
        return SimpleNamespace(sample=samples)


def make_pipeline(
    folder: Path, config: Config, sampler: str, dtype: "torch.dtype | None" = None
) -> "DiTPipeline":
    """diffusers' pipeline of the weights in a folder, without a VAE."""
    from torch_dit import stub_torchvision

    stub_torchvision()
    from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

    options = dict(torch_dtype=dtype, low_cpu_mem_usage=False)
    transformer = DiTTransformer2DModel.from_pretrained(folder, **options)
    for block in transformer.transformer_blocks:  # the published model's frequencies, and ours
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    schedules = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[sampler](
        num_train_timesteps=config.objective.num_steps,
        beta_schedule=schedules[config.objective.schedule],
        clip_sample=not config.data.latents,
    )
    pipeline = DiTPipeline(transformer, NoVAE(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_peer(
    folder: Path, config: Config, labels: list[int], dtype: str, options: Options
) -> tuple[str, float]:
    """The device, and images/s on it."""
    import torch

    torch.set_num_threads(os.cpu_count())  # as XLA has
    on_gpu = torch.cuda.is_available()
    pipeline = make_pipeline(
        folder / "diffusers", config, options.sampler, getattr(torch, dtype)
    ).to("cuda" if on_gpu else "cpu")

    def draw() -> object:
        sizes = dict(guidance_scale=options.guidance, num_inference_steps=options.steps)
        return pipeline(labels, **sizes, output_type="np")

    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    return device, images_per_second(draw, options)


# In the process that compares


def make_rows(config: Config, options: Options) -> list[Row]:
    """Ours against the peer in each of its types, measured in turn."""
    dtype = config.train.dtype
    peer_dtypes = options.peer_dtypes or (dtype,)
    labels = [i % 10 for i in range(options.num_samples)]
    what = f"{options.sampler} {options.steps}, guidance {options.guidance:g}"
    case = f"{config.name}, {what}, {dtype}, batch {len(labels)}"
    ours, theirs = [], {name: [] for name in peer_dtypes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_own_process(write_weights, config, folder)
        for _ in range(options.rounds):
            device, rate = in_own_process(measure_ours, folder, labels, options)
            ours.append(rate)
            print(f"{case}: ours {rate:.4g} images/s", flush=True)
            for name, rates in theirs.items():
                arguments = (folder, config, labels, name, options)
                _, rate = in_own_process(measure_peer, *arguments)
                rates.append(rate)
                print(f"{case}: DiTPipeline, {name} {rate:.4g} images/s", flush=True)
    return [
        make_row("sampling", case, "images/s", ours, f"DiTPipeline, {name}", rates, device)
        for name, rates in theirs.items()
    ]


def parse(argv: list[str]) -> tuple[Options, list[Config]]:
    """The options, and the config of each preset. Raises InputError."""
    options, configs = parse_presets(Options, argv, "benchmarks/sampling.py", __doc__)
    configs = [replace(config, data=dict(num_classes=1000)) for config in configs]
    for config in configs:
        check_comparable(config, options)
    for package in ("torch", "diffusers"):
        require(find_spec(package), package, None, "installed: pip install -e '.[parity]'")
    return options, configs


def check_comparable(config: Config, options: Options) -> None:
    model, masks, objective = config.model, config.data.mask_classes, config.objective
    design = (model.conditioning, model.mlp_ratio, masks, objective.name)
    expected = ("adaln_zero", 4.0, 0, "ddpm")
    fields = "model.conditioning, model.mlp_ratio, data.mask_classes, objective.name"
    require(design == expected, fields, design, f"the pipeline's {expected}")
    timesteps = objective.num_steps
    fits = options.steps <= timesteps
    require(fits, "--steps", options.steps, f"from 1 to the model's {timesteps} timesteps")


def main() -> None:
    options, configs = parse(sys.argv[1:])
    rows = [row for config in configs for row in make_rows(config, options)]
    report(rows, options.json)


if __name__ == "__main__":
    with cli.exit_status("benchmarks/sampling.py"):
        main()
