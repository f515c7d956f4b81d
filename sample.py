"""Samples class-conditional images: python sample.py WORKDIR_OR_WEIGHTS --classes 207 "red panda" --guidance 4 --out x.png

Writes a labelled grid, one class a row (.png), or `arr_0` uint8 [N, H, W, C] and `arr_1` int64 labels, the form of the ADM evaluator
(.npz); the latter goes on where it was killed. Sample i is a function of (--seed, i), whatever the batch size and the number of devices.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils
from PIL import Image

from dit import checkpoint, sampling
from dit import config as dit_config
from dit.config import Config, InputError, one_line, require
from dit.images import centre_crop, from_uint8, save_grid, to_uint8, write_npz
from dit.log import Progress
from dit.normalization import AdaIN
from dit.sharding import batch_sharding, connect, make_mesh, map_parts, parts_of, replicated
from dit.state import make_objective
from dit.weights import load_vae

DECODED_PIXELS = 2**19  # that the VAE decodes at a time on each device: 8 images at 256x256, for which a CPU took 4 GB in all


@dataclass(frozen=True)
class Sample:
    workdir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORKDIR_OR_WEIGHTS")]  # such as runs/digits
    classes: tuple[str, ...] = ()  # classes to draw, by number or name; none are all of them, and ten in a grid
    per_class: int = 8  # images of each class
    num_samples: int | None = None  # so many images of classes drawn at random, instead of per_class of each; for .npz
    guidance: float = 1.0  # scale of classifier-free guidance; 1 is none, 4 makes typical pictures
    sampler: Literal["ddpm", "ddim"] | None = None  # ancestral, or (at eta 0) deterministic; None is the run's train.sampler
    steps: int | None = None  # denoising steps; None is the run's train.sample_steps
    eta: float = 0.0  # noise of DDIM, from 0 to DDPM's at 1
    cfg_channels: int | None = None  # guide only the first so many channels; None guides all, 3 is the published DiT
    guidance_interval: tuple[float, float] | None = None  # guide only at timesteps from LOW to below HIGH
    mask: str | None = None  # picture of the layout's labels, for a model with masks; None asks for no layout
    resize_mask: bool = False  # resize a mask of another size
    style: str | None = None  # picture whose channel means and deviations each prediction of the clean image takes (AdaIN)
    style_strength: float = 1.0  # how far it takes them: 0 is not at all
    vae: str | None = None  # folder of the VAE that decodes latents (diffusers' AutoencoderKL); None is the run's data.vae
    seed: int = 0  # of all noise
    batch_size: int = 256  # images at a time, over all devices of a host
    dtype: Literal["float32", "bfloat16"] | None = None  # of the network's computation; None is the run's train.dtype
    ema: bool = True  # take the average of the weights rather than the last
    distributed: bool = False  # several hosts, which share the folder of --out: call jax.distributed.initialize() first
    out: str = "samples.png"  # .png for a grid, .npz for arrays


def class_number(word: str, names: tuple[str, ...]) -> int:
    """The class that a number or a name says; names may hold synonyms, separated by commas. Raises InputError."""
    K = len(names)
    if re.fullmatch("-?[0-9]+", word):
        require(0 <= int(word) < K, "--classes", int(word), f"from 0 to {K - 1}: the model has {K} classes")
        return int(word)
    numbers = {}
    for k, name in enumerate(names):
        for synonym in {name.casefold(), *name.casefold().split(", ")}:
            numbers.setdefault(synonym, []).append(k)
    found = numbers.get(word.casefold())
    if found is None:
        near = difflib.get_close_matches(word.casefold(), numbers, n=1, cutoff=0)[0]
        raise InputError(f"--classes: {word!r} should be a number from 0 to {K - 1} or the name of a class; the nearest is {near!r}")
    require(len(found) == 1, "--classes", word, "one of the numbers " + ", ".join(f"{k} ({names[k]})" for k in found))
    return found[0]


def spread(num_classes: int) -> np.ndarray:
    """The classes of a grid that cannot show all: ten, evenly spaced."""
    return np.unique(np.linspace(0, num_classes - 1, min(num_classes, 10)).astype(int))


def completed(options: Sample, config: Config) -> Sample:
    """The options, with what they leave open taken from the model's config. Raises InputError for what the model cannot meet."""
    K, T, C = config.data.num_classes, config.objective.num_steps, config.input_shape[2]
    everything = spread(K) if options.out.endswith(".png") else range(K)
    numbers = [class_number(word, config.data.class_names) for word in options.classes] or everything
    options = dataclasses.replace(options, classes=tuple(str(k) for k in numbers), vae=options.vae or config.data.vae,
                                  sampler=options.sampler or config.train.sampler,
                                  steps=config.train.sample_steps if options.steps is None else options.steps)
    require(options.per_class > 0, "--per-class", options.per_class, "more than 0")
    require(options.batch_size > 0, "--batch-size", options.batch_size, "more than 0")
    require(0 < options.steps <= T, "--steps", options.steps, f"from 1 to the model's {T} timesteps")
    low, high = options.guidance_interval or (0, math.inf)
    require(math.isfinite(options.guidance), "--guidance", options.guidance, "a number")
    require(low < high, "--guidance-interval", options.guidance_interval, "LOW and a HIGH above it")
    require(0 <= options.eta <= 1, "--eta", options.eta, "from 0 to 1")
    require(options.cfg_channels is None or 0 < options.cfg_channels <= C, "--cfg-channels", options.cfg_channels, f"from 1 to {C}")
    out = Path(options.out)
    require(out.suffix in (".png", ".npz"), "--out", options.out, "a .png or .npz file")
    require(out.parent.is_dir(), "--out", options.out, f"in a folder that exists, unlike {str(out.parent)!r}")
    require(not out.is_dir() and os.access(out.parent, os.W_OK), "--out", options.out, "a file that can be written")
    require(0 <= options.seed < 2**32, "--seed", options.seed, "from 0 to 2^32 - 1")
    if options.num_samples is not None:
        require(options.num_samples > 0, "--num-samples", options.num_samples, "more than 0")
        require(out.suffix == ".npz", "--num-samples", options.num_samples, "given with an --out that ends in .npz")
    require(options.mask is None or config.data.mask_classes, "--mask", options.mask, "left out: the model was trained without masks")
    require(0 <= options.style_strength <= 1, "--style-strength", options.style_strength, "from 0 to 1")
    if config.data.latents:
        require(options.vae is not None, "--vae", options.vae, "the folder of a VAE: the model makes latents, not pixels")
    else:
        require(options.vae is None, "--vae", options.vae, "left out: the model makes pixels, not latents")
    return options


def labels_of(options: Sample, config: Config) -> np.ndarray:
    """The label of every sample, int32 `[N]`: `per_class` of each class, or that of sample i drawn from (seed, i)."""
    classes = np.array(options.classes, np.int32)
    if options.num_samples is None:
        return classes.repeat(options.per_class)
    keys = sampling.sample_keys(options.seed, jnp.arange(options.num_samples))
    unused = config.objective.num_steps + 1  # the samplers fold in the timesteps, and their number
    return classes[jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, unused), (), 0, len(classes)))(keys)]


def read_mask(options: Sample, config: Config) -> np.ndarray:
    """The mask uint8 `[H, W]` of a picture, or the null mask where none is asked for. Raises InputError."""
    size, K = config.data.image_size, config.data.mask_classes
    if options.mask is None:
        return np.full((size, size), K, np.uint8)
    mask = open_picture("--mask", options.mask, "L")  # [h, w, 1]
    if mask.shape[:2] != (size, size):
        require(options.resize_mask, "--mask", f"{mask.shape[1]}x{mask.shape[0]}", f"{size}x{size}, or be resized with --resize-mask")
    mask = centre_crop(mask, size, labels=True)[..., 0]
    mask = np.where(mask == 255, 1, mask) if K == 2 else mask  # black and white are as good as 0 and 1
    require(mask.max() < K, "--mask", int(mask.max()), f"labels from 0 to {K - 1}: the model's masks have {K} classes")
    return mask.astype(np.uint8)


def read_style(path: str, config: Config, vae) -> jax.Array:
    """A picture as the sampler takes it: pixels in [-1, 1] or scaled latents, `[1, h, w, C]`. Raises InputError."""
    C = config.data.channels
    image = open_picture("--style", path, "L" if C == 1 else "RGB")
    require(C == 1 or (image != image[..., :1]).any(), "--style", path, "a picture in colour, as the model's are")
    if vae is None:
        return from_uint8(jnp.asarray(image))[None]
    crop = from_uint8(jnp.asarray(centre_crop(image, config.data.image_size)))[None]
    return config.data.latent_scale * jax.jit(lambda vae, x: vae.encode(x)[0])(vae, crop)


def open_picture(option: str, path: str, mode: str) -> np.ndarray:
    """uint8 `[h, w, 1]` for the mode "L", where a palette stays the labels it is, and `[h, w, 3]` for "RGB". Raises InputError."""
    try:
        picture = Image.open(path)
        pixels = np.asarray(picture if mode == "L" and picture.mode == "P" else picture.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{option}: {path!r} should be a picture ({one_line(error)})") from error
    require(not picture.mode.startswith(("I", "F")), option, path, f"a picture of 8 bits a channel, unlike its {picture.mode!r}")
    return pixels.reshape(*pixels.shape[:2], -1)


def make_sampler(config: Config, options: Sample, devices: int = 1, style: jax.Array | None = None):
    """The jitted function (model, vae, y, indices `[B]`) -> uint8 `[B, H, W, C]`; y is what the model takes, vae is None for pixels.

    devices: how many share the batch, of which each decodes only so many latents at a time as fit. style: `[1, h, w, C]`, pixels or
    latents, whose statistics the predictions take.
    """
    process, K = make_objective(config), config.data.num_classes
    null = (K, config.data.mask_classes) if config.data.mask_classes else K

    def correct(x0):
        x0 = x0 if style is None else AdaIN(options.style_strength)(x0, style)
        return x0 if config.data.latents else sampling.clip_pixels(x0)

    @jax.jit
    def sample(model, vae, y, indices):
        keys = sampling.sample_keys(options.seed, indices)
        denoise = sampling.guided(model, y, null, options.guidance, options.cfg_channels, options.guidance_interval)
        if options.sampler == "ddpm":
            x = sampling.ddpm(process, denoise, keys, config.input_shape, options.steps, correct)
        else:
            x = sampling.ddim(process, denoise, keys, config.input_shape, options.steps, options.eta, correct)
        if vae is None:
            return to_uint8(x)
        parts = parts_of(len(indices) // devices, DECODED_PIXELS // config.data.image_size**2)
        return map_parts(lambda z: to_uint8(vae.decode(z / config.data.latent_scale)), x, parts)

    return sample


def make_draw(model, vae, config: Config, options: Sample, mesh: jax.sharding.Mesh):
    """The function (labels `[N]`, first index) -> uint8 `[N, H, W, C]`, in equal batches over the mesh's devices."""
    devices, rows = mesh.devices.size, batch_sharding(mesh)
    sample = make_sampler(config, options, devices, read_style(options.style, config, vae) if options.style else None)
    mask = read_mask(options, config) if config.data.mask_classes else None

    def draw(labels: np.ndarray, first: int) -> np.ndarray:
        N = len(labels)
        padded = np.minimum(np.arange(-(-N // devices) * devices), N - 1)  # the last image repeated, to fill all devices
        y = labels[padded] if mask is None else (labels[padded], np.tile(mask, (len(padded), 1, 1)))
        return np.asarray(sample(model, vae, *jax.device_put((y, first + padded), rows)))[:N]

    return draw


def draw_all(draw, labels: np.ndarray, batch_size: int) -> np.ndarray:
    """uint8 `[N, H, W, C]`, image i of label i."""
    images, progress = [], Progress(len(labels), "images")
    for first in range(0, len(labels), batch_size):
        images.append(draw(labels[first:first + batch_size], first))
        progress.advance(len(images[-1]))
    return np.concatenate(images)


def draw_to_file(draw, labels: np.ndarray, options: Sample, step: int) -> None:
    """Writes the .npz by way of a folder of parts, one a batch, that a second call completes. Each host draws its share of them."""
    out, folder = Path(options.out), Path(options.out + ".parts")
    pictures = [zlib.crc32(Path(path).read_bytes()) for path in (options.mask, options.style) if path]
    request = dataclasses.asdict(options) | {"checkpoint": step, "out": out.name, "pictures": pictures}
    request = json.loads(json.dumps(request))  # as it is read back
    if jax.process_index() == 0:
        prepare_parts(folder, request)
    multihost_utils.sync_global_devices("the folder of parts is there")
    parts = [folder / f"{first:09d}.npy" for first in range(0, len(labels), options.batch_size)]
    mine = parts[jax.process_index()::jax.process_count()]
    todo = [part for part in mine if not part.exists()]
    progress = Progress(len(labels), "images", sum(len(np.load(part, mmap_mode="r")) for part in parts if part.exists()))
    for part in todo:
        first = int(part.stem)
        images = draw(labels[first:first + options.batch_size], first)
        with (unfinished := part.with_suffix(".tmp")).open("wb") as file:
            np.save(file, images)
        unfinished.rename(part)
        progress.advance(len(images))
    multihost_utils.sync_global_devices("all parts are there")
    if jax.process_index() == 0:
        write_npz(out, parts, labels.astype(np.int64))
        shutil.rmtree(folder.rename(out.with_name(out.name + ".done")))  # what is left by a kill here is not taken for parts


def prepare_parts(folder: Path, request: dict) -> None:
    """Makes the folder of parts, or checks that those in it are of this request. Raises InputError."""
    asked = folder / "request.json"
    try:
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            (unfinished / "request.json").write_text(json.dumps(request))
            unfinished.rename(folder)
        begun = dict(json.loads(asked.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--out: {str(folder)!r} should be a folder of parts of this request ({one_line(error)}); remove it, or choose "
                         "another --out") from error
    for name, value in request.items():
        if begun.get(name) != value:
            raise InputError(f"--out: {str(folder)!r} holds a part of another request, with {name} {begun.get(name)!r} rather than "
                             f"{value!r}; remove it, or choose another --out")


def run(options: Sample) -> Path:
    """Draws what the options ask for and returns the file it wrote. Raises InputError."""
    connect(options.distributed, "--distributed")
    mesh = make_mesh(dit_config.Mesh(), jax.local_device_count(), devices=jax.local_devices())  # each host draws on its own
    workdir = Path(options.workdir)
    step, broken = checkpoint.newest_intact(workdir)
    for other, what in broken.items():
        print(f"checkpoint {other}: {what}; using checkpoint {step}")
    options = completed(options, checkpoint.stored_config(workdir, step))
    model, config = checkpoint.load(workdir, options.ema, replicated(mesh), options.dtype, step)
    vae = jax.device_put(load_vae(options.vae), replicated(mesh)) if options.vae else None
    labels, draw = labels_of(options, config), make_draw(model, vae, config, options, mesh)
    if options.out.endswith(".npz"):
        draw_to_file(draw, labels, options, step)
    elif jax.process_index() == 0:
        names = [config.data.class_names[int(k)].split(",")[0] for k in options.classes]
        save_grid(options.out, draw_all(draw, labels, options.batch_size), names)
    return Path(options.out)


def main(argv: list[str] | None = None) -> None:
    with dit_config.input_errors("sample.py"):
        options = dit_config.parse(Sample, sys.argv[1:] if argv is None else argv, "sample.py", __doc__)
        print(f"wrote {run(options)}")


if __name__ == "__main__":
    main()
