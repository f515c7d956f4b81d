"""Condition -> pictures: the one sampler that sample grids, `sample.py` and FID share."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dit import sampling
from dit.config import Config, check_sampler, check_steps, require
from dit.data import Condition, Dataset, null_condition
from dit.images import read_part, to_uint8, write_npz, write_part
from dit.model import DiT
from dit.normalization import AdaIN
from dit.progress import Progress, with_progress
from dit.sharding import local_mesh, map_parts, num_parts, place_rows, replicated
from dit.state import make_objective

VAE_PIXELS = 2**19  # that the VAE decodes or encodes at a time on a device: 8 images of 256x256
GRID_COLUMNS = 8
GRID_BATCH = 16  # images of a grid at a time: a stop waits for no more
LABEL_TAG = 2**30  # folded into a sample's key for its label; the samplers fold in timesteps

Draw = Callable[[DiT, Any, int], np.ndarray]
Check = Callable[[], None]


# What to draw


def spread_classes(num_classes: int, at_most: int = 10) -> list[int]:
    """At most ten classes, evenly spaced."""
    count = min(num_classes, at_most)
    return np.linspace(0, num_classes - 1, count).astype(int).tolist()


def draw_labels(how: str, seed: int, classes: np.ndarray, count: int) -> np.ndarray:
    """Labels int32 `[count]`: `balanced`, as many of each class up to one, or `random`.

    A random label i is a function of (seed, i).
    """
    classes = np.asarray(classes, np.int32)
    if how == "balanced":
        return classes[np.arange(count) % len(classes)]

    def pick(key: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, LABEL_TAG), (), 0, len(classes))

    return classes[jax.vmap(pick)(sampling.sample_keys(seed, jnp.arange(count)))]


def mixtures(first: int, last: int, count: int, num_classes: int) -> np.ndarray:
    """Weights that go from one class to another in equal steps, `[count, num_classes + 1]`."""
    share = np.linspace(0, 1, count, dtype=np.float32)
    weights = np.zeros((count, num_classes + 1), np.float32)
    weights[:, first] += 1 - share
    weights[:, last] += share
    return weights


def make_condition(
    labels: np.ndarray, config: Config, mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The condition of labels `[N]` and, for a model with masks, of mask `[H, W]` or `[N, H, W]`.

    labels may be weights of the classes to mix, `[N, num_classes + 1]`. A model with masks gets the
    null mask if none is given. Raises InputError.
    """
    labels, null = np.asarray(labels), config.data.num_classes
    is_soft = labels.ndim == 2
    if is_soft:
        shape = (len(labels), null + 1)
        require(labels.shape == shape, "labels", labels.shape, f"of the shape {shape}")
    else:
        are_labels = labels.ndim == 1 and labels.dtype.kind in "iu" and labels.size > 0
        fits = are_labels and labels.min() >= 0 and labels.max() <= null
        expected = f"integers from 0 to {null - 1}, or {null}, the null class"
        require(fits, "labels", labels.tolist(), expected)
    condition = {"y": labels.astype(np.float32 if is_soft else np.int32)}
    if config.data.mask_classes:
        H, W, _ = config.input_shape
        null = np.uint8(config.data.mask_classes)
        condition["mask"] = np.broadcast_to(null if mask is None else mask, (len(labels), H, W))
    return condition


def example_masks(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """A mask for each label, `[N, H, W]`: of an image of the class, if there is one in 1,000."""
    count = min(len(dataset.records), 1000)
    examples = dataset.records.read(range(count))
    chosen = []
    for i, label in enumerate(labels):
        candidates = np.flatnonzero(examples["label"] == label)
        if len(candidates) == 0:
            candidates = np.arange(count)
        chosen.append(candidates[i % len(candidates)])
    return examples["mask"][chosen]


# Drawing it


@cache
def make_sampler(
    config: Config,
    mesh: jax.sharding.Mesh,
    sampler: str | Callable,
    steps: int,
    eta: float,
    cfg_channels: int | None,
    guidance_interval: tuple[float, float] | None,
    style_strength: float,
    frames: int | None = None,
) -> Callable:
    """The function (model, vae, condition, indices, seed, scale, style, guide) -> uint8
    `[B, H, W, C]`.

    With frames, F states of each sample from noise to image: `[B, F, H, W, C]`. One compilation
    serves every condition, seed and scale of guidance; None, for no guidance, has its own, and so
    have no style and no guide.
    """
    process = make_objective(config)
    samplers = {
        "ddpm": sampling.ddpm,
        "ddim": partial(sampling.ddim, eta=eta),
        "euler": sampling.euler,
        "heun": sampling.heun,
    }
    run = sampler if callable(sampler) else samplers[sampler]
    if guidance_interval is not None:  # in the network's time
        low, high = guidance_interval
        guidance_interval = (process.time_scale * low, process.time_scale * high)

    def to_images(x: jax.Array, vae: Any) -> jax.Array:
        return to_uint8(x) if vae is None else decode(vae, x, config, mesh.devices.size)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def sample(
        model: DiT,
        vae: Any,
        condition: Condition,
        indices: jax.Array,
        seed: jax.Array,
        scale: jax.Array | None,
        style: jax.Array | None,
        guide: DiT | None,
    ) -> jax.Array:
        def correct(x0: jax.Array) -> jax.Array:
            if style is not None:
                x0 = AdaIN(style_strength)(x0, style)
            return x0 if config.data.latents else sampling.clip_pixels(x0)

        null = null_condition(condition, config.data)
        fixed = (cfg_channels, guidance_interval)
        denoise = sampling.guided(model, condition, null, scale, *fixed, guide)
        keys = sampling.sample_keys(seed, indices)
        denoised = partial(run, process, denoise, keys, config.input_shape, steps, correct=correct)
        if frames is None:
            return to_images(denoised(), vae)
        _, states = denoised(trajectory=True, frames=frames)
        x = states.x.swapaxes(0, 1)  # [B, F, H, W, C]
        images = to_images(x.reshape(-1, *config.input_shape), vae)
        return images.reshape(*x.shape[:2], *images.shape[1:])

    return sample


def make_draw(
    config: Config,
    mesh: jax.sharding.Mesh,
    condition: dict[str, np.ndarray],
    batch_size: int,
    *,
    sampler: str | Callable,
    steps: int,
    guidance: float = 1.0,
    eta: float = 0.0,
    cfg_channels: int | None = None,
    guidance_interval: tuple[float, float] | None = None,
    seed: int = 0,
    style: jax.Array | None = None,
    style_strength: float = 1.0,
    guide: DiT | None = None,
    frames: int | None = None,
    same_noise: bool = False,
) -> Draw:
    """The function (model, vae, first) -> uint8 `[n, H, W, C]`, sampled on all devices of the mesh.

    sampler: a name, or a function as those of dit/sampling.py are, for the config's objective. It
    draws the samples first .. first + n - 1 of the N that `condition` describes, where n is
    `batch_size`, or fewer at the end. Sample i is a function of (seed, i), whatever the batch and
    the number of devices. vae is None for pixels. style: pixels or latents `[1, h, w, C]`, whose
    channel means and deviations each prediction of x_0 takes. guidance_interval is in the
    objective's own time. guide: a worse model to guide away from, in place of the null condition.
    frames: draw at most so many states of each sample, two or more, evenly from noise to image:
    `[n, F, H, W, C]`. same_noise: every sample has that of sample 0.
    """
    num_samples = len(condition["y"])
    batch_size = min(batch_size, num_samples)
    indices = np.zeros(num_samples, int) if same_noise else np.arange(num_samples)
    fixed = (sampler, steps, eta, cfg_channels, guidance_interval)
    sample = make_sampler(config, mesh, *fixed, style_strength, frames)
    scale = None if guidance == 1 else guidance
    style = None if style is None else np.asarray(style)

    def draw(model: DiT, vae: Any, first: int) -> np.ndarray:
        stop = min(first + batch_size, num_samples)
        rows = {name: value[first:stop] for name, value in condition.items()}
        inputs = place_rows((rows, indices[first:stop]), batch_size, mesh)
        with jax.set_mesh(mesh):  # so that sharded weights are gathered, as in training
            images = sample(model, vae, *inputs, np.uint32(seed), scale, style, guide)
        return np.asarray(images)[: stop - first]

    return draw


def generate(
    model: DiT,
    config: Config,
    labels: np.ndarray,
    *,
    guidance: float = 1.0,
    seed: int = 0,
    sampler: str | Callable | None = None,
    steps: int | None = None,
    vae: Any = None,
    mask: np.ndarray | None = None,
    guide: DiT | None = None,
    batch_size: int = 256,
    **options: Any,
) -> np.ndarray:
    """Images of labels `[N]`, or of weights of the classes to mix: uint8 `[N, H, W, C]`.

    Image i is a function of (seed, i). sampler and steps: None is the run's. vae: of `load_vae`,
    for a model of latents. mask: uint8 `[H, W]` or `[N, H, W]`. guide: a worse model to guide away
    from. options: of `make_draw`, such as `frames`. Raises InputError.
    """
    sampler, steps = sampler or config.sampler, steps or config.train.sample_steps
    if isinstance(sampler, str):
        check_sampler("sampler", sampler, config.objective)
    check_steps("steps", steps, config.objective)
    fits = (vae is None) == (config.data.latents is None)
    expected = "given, as by dit.load_vae(folder), for a model of latents, and for no other"
    require(fits, "vae", type(vae).__name__, expected)
    mesh = local_mesh()
    model, vae, guide = jax.device_put((model, vae, guide), replicated(mesh))
    draw = make_draw(
        config,
        mesh,
        make_condition(labels, config, mask),
        batch_size,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        seed=seed,
        guide=guide,
        **options,
    )
    return draw_all(draw, model, vae, len(labels), batch_size)


def noise_levels(config: Config, steps: int, frames: int) -> np.ndarray:
    """The noise level of each state that is drawn with `frames`, `[F]`.

    The weight of the noise in x_t: sqrt(1 - abar_t) of DDPM, t of flow.
    """
    levels = make_objective(config).noise_levels(steps)
    return levels[sampling.kept_steps(steps, frames)]


def decode(vae: Any, latents: jax.Array, config: Config, devices: int) -> jax.Array:
    """Scaled latents `[B, h, w, C]` to uint8 `[B, H, W, 3]`, as many at a time as fit a device."""
    parts = num_vae_parts(len(latents), config.data.image_size, devices)
    scale = config.data.latent_scale
    return map_parts(lambda z: to_uint8(vae.decode(z / scale)), latents, parts)


def num_vae_parts(num_images: int, image_size: int, devices: int) -> int:
    """The parts of a batch that the VAE takes one after the other, to fit a device's memory."""
    return num_parts(num_images // devices, VAE_PIXELS // image_size**2)


def make_grid_sampler(
    config: Config,
    vae: Any,
    dataset: Dataset,
    mesh: jax.sharding.Mesh,
    check_stop: Check = lambda: None,
) -> Callable[[DiT], tuple[np.ndarray, list[str]]]:
    """The function (model) -> uint8 `[rows * 8, H, W, C]` from fixed noise, and the rows' names.

    It is drawn in batches, with `check_stop` before each.
    """
    train = config.train
    classes = spread_classes(config.data.num_classes)
    labels = np.repeat(classes, GRID_COLUMNS)
    masks = example_masks(dataset, labels) if config.data.mask_classes else None
    batch_size = max(GRID_BATCH, mesh.devices.size)
    draw = make_draw(
        config,
        mesh,
        make_condition(labels, config, masks),
        batch_size,
        sampler=config.sampler,
        steps=train.sample_steps,
        guidance=train.guidance,
        seed=train.seed,
    )
    names = short_names(classes, dataset.class_names)

    def draw_grid(model: DiT) -> tuple[np.ndarray, list[str]]:
        batches = draw_batches(draw, model, vae, len(labels), batch_size, check_stop)
        return np.concatenate(list(batches)), names

    return draw_grid


def short_names(classes: Iterable[int], class_names: tuple[str, ...]) -> list[str]:
    """The name of each class without its synonyms."""
    return [class_names[k].split(",")[0] for k in classes]


def draw_batches(
    draw: Draw,
    model: DiT,
    vae: Any,
    num_samples: int,
    batch_size: int,
    check_stop: Check = lambda: None,
) -> Iterator[np.ndarray]:
    """All samples, a batch at a time: uint8 `[n, H, W, C]`. `check_stop` can raise between them."""
    for first in range(0, num_samples, batch_size):
        check_stop()
        yield draw(model, vae, first)


def draw_all(draw: Draw, model: DiT, vae: Any, num_samples: int, batch_size: int) -> np.ndarray:
    """All samples, uint8 `[N, H, W, C]`."""
    batches = draw_batches(draw, model, vae, num_samples, batch_size)
    return np.concatenate(list(with_progress(batches, num_samples)))


def draw_npz(
    draw: Draw, model: DiT, vae: Any, labels: np.ndarray, batch_size: int, out: Path, parts: Path
) -> None:
    """Draws every sample into `out`, in files of one batch that a second call goes on from.

    The folder `parts` has to exist on all hosts; each host draws its share of the files that are
    missing or damaged, and counts these alone.
    """
    paths = {first: parts / f"{first:09d}.npy" for first in range(0, len(labels), batch_size)}
    mine = list(paths)[jax.process_index() :: jax.process_count()]
    missing = [first for first in mine if read_part(paths[first]) is None]
    counts = {first: len(labels[first : first + batch_size]) for first in mine}
    total = sum(counts.values())
    done = total - sum(counts[first] for first in missing)
    with contextlib.closing(Progress(total, "image", done)) as progress:
        for first in missing:
            images = draw(model, vae, first)
            write_part(paths[first], images)
            progress.advance(len(images))
    multihost_utils.sync_global_devices("every file of a batch is written")
    if jax.process_index() == 0:
        write_npz(out, list(paths.values()), labels.astype(np.int64))
