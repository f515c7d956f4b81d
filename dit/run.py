"""What a run is made of: data and devices, the first state, the judges, and what it says."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from dit import generation, resume
from dit.config import Config
from dit.data import Dataset, open_dataset, with_num_classes
from dit.heldout import make_held_out_loss
from dit.imagenet.fid import make_evaluation
from dit.imagenet.vae import load_vae
from dit.model import DiT, check_block, count_parameters, multiply_adds
from dit.progress import say
from dit.sharding import make_mesh, place, replicated
from dit.state import State, make_state


def open_run(config: Config) -> tuple[Config, jax.sharding.Mesh, Dataset, int, list[str]]:
    """What a run needs before it can begin. Writes nothing. Raises InputError.

    The config with its data's number of classes, the mesh, the data, the step to go on from, and a
    line on each damaged checkpoint.
    """
    mesh = make_mesh(config)
    check_block(config.model.conditioning, config.data.mask_classes)
    dataset = open_dataset(config.data)
    config = with_num_classes(config, dataset)
    return config, mesh, dataset, *resume.step_to_resume(config, dataset)


def first_state(
    config: Config, mesh: jax.sharding.Mesh, start: int, weights: dict[str, jax.Array]
) -> State:
    """The state that a run goes on from: of checkpoint `start`, or of step 0 with other weights."""
    if start == 0:
        return resume.with_weights(make_state(config, mesh), weights)
    return resume.restore(config, mesh, start)


def make_judges(
    config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, check_stop: Callable[[], None]
) -> tuple[Callable | None, Callable | None, Callable | None]:
    """What scores a model, what draws it and what measures its loss on held-out images, None where
    the config asks for none.
    """
    vae = evaluate = draw_grid = held_out_loss = None
    if config.data.vae:
        vae = place(load_vae(config.data.vae, config.data.latent_scale), replicated(mesh))
    if config.eval.every:
        evaluate = make_evaluation(config, vae, mesh, check_stop)
    if config.train.sample_every and (vae is not None or not config.data.latents):
        draw_grid = generation.make_grid_sampler(config, vae, dataset, mesh, check_stop)
    if config.eval.split:
        held_out_loss = make_held_out_loss(config, mesh)
    return evaluate, draw_grid, held_out_loss


def held_out_losses(
    config: Config, held_out_loss: Callable[[DiT], float], state: State
) -> dict[str, float]:
    """Of the last weights, as the loss of a step is, and of each average."""
    losses = {"held_out_loss": held_out_loss(state.model)}
    for name, ema in zip(config.optim.averages, state.emas, strict=True):
        losses[f"held_out_loss_{name}"] = held_out_loss(ema)
    return losses


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether a step is a multiple of `every`, or the last."""
    return step == steps or (every > 0 and step % every == 0)


# What it says


def describe(config: Config, state: State, num_images: int, start: int) -> None:
    parameters = count_parameters(state.model)
    gigas = multiply_adds(state.model) / 1e9
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    say(
        f"{config.name}: {parameters:,} parameters, {gigas:.3g} G multiply-adds an image, "
        f"{num_images:,} images, {devices}, from step {start}"
    )
    for line in resume.describe_changes(config, start):
        say(line)
    if config.data.latents and not config.data.vae:
        say("no sample grids are drawn: --data.vae names no VAE that would decode them")


def describe_result(config: Config) -> None:
    """Where a run's pictures are, and the command that draws more of them."""
    grids = config.workdir / "samples"
    if any(grids.iterdir()):
        say(f"sample grids are in {grids}")
    here = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
    script = os.path.relpath(Path(__file__).parent.with_name("sample.py"))
    words = [here, script, str(config.workdir), "--guidance", f"{config.train.guidance:g}"]
    if config.data.latents and not config.data.vae:
        words += ["--vae", "VAE_FOLDER"]
    say(f"more samples by: {shlex.join(words)}")
