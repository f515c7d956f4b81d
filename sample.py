"""Samples images: python sample.py WORKDIR_OR_WEIGHTS --classes 207 "red panda" --out x.png

Writes a labelled grid, one class a row (.png); the same grid from noise to image (.gif); or `arr_0`
uint8 [N, H, W, C] and `arr_1` int64 labels, the form of the ADM evaluator (.npz). An .npz goes on
where it was killed. Sample i is a function of (--seed, i), whatever the batch size and the number
of devices.
"""

from dit.signals import StopRequest

if __name__ == "__main__":
    StopRequest().end_at_once("sample.py")

import contextlib
import dataclasses
import operator
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dit import cli, intact
from dit.config import (
    AtLeastTwo,
    Config,
    Count,
    Decay,
    InputError,
    Labels,
    LocalPath,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Sampler,
    Seed,
    check_sampler,
    check_steps,
    check_value,
    nearest,
    require,
)
from dit.files import claim_folder, naming
from dit.hosts import (
    command_refused_together,
    connect_hosts,
    ended_together,
    refused_together,
)

GIF_FRAMES = 32  # unless --frames says how many

Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORKDIR_OR_WEIGHTS")]


@dataclass(frozen=True)
class Sample:
    workdir: Source  # a run's folder or weights, or one checkpoint: runs/digits/checkpoints/3000
    step: NonNegativeInt | None = None  # step of the checkpoint; None is the newest
    classes: tuple[str, ...] = ()  # classes by number or name; if none, all, or ten in a grid
    interpolate: tuple[str, str] | None = None  # row from one class to another, in one noise
    per_class: PositiveInt | None = None  # images of a class or a row; None is 8, 1 in a strip
    frames: AtLeastTwo | None = None  # states from noise to image; in a .png a strip of them
    num_samples: Count | None = None  # images of random classes instead; for .npz
    labels: Labels = "random"  # classes of --num-samples; balanced: equally many of each
    guidance: float = 1.0  # scale of classifier-free guidance; 1 is none, 4 makes typical pictures
    sampler: Sampler | None = None  # sampler: ddpm or ddim, for flow heun or euler; None: the run's
    steps: PositiveInt | None = None  # denoising steps; None is the run's train.sample_steps
    eta: Probability = 0.0  # noise of DDIM, from 0 to DDPM's at 1
    cfg_channels: PositiveInt | None = None  # guide only the first channels; the paper's DiT has 3
    guidance_interval: tuple[float, float] | None = None  # guide only at times LOW <= t < HIGH
    guide_with: str | None = None  # guide away from a worse model: a folder, or a step of the run
    mask: str | None = None  # picture of the layout's labels, for a model with masks
    resize_mask: bool = False  # resize a mask of another size
    style: str | None = None  # picture whose channel statistics the samples take (AdaIN)
    style_strength: Probability = 1.0  # how far the samples take them; 0 is not at all
    vae: str | None = None  # folder of the VAE that decodes latents; None is the run's data.vae
    seed: Seed = 0  # seed of all noise
    batch_size: PositiveInt = 256  # images at a time, over all devices of a host
    dtype: Literal["float32", "bfloat16"] | None = None  # type of the products; None is the run's
    ema: bool = True  # take the averaged weights rather than the last
    ema_decay: Decay | None = None  # average to take, of a run with several; None is the first
    distributed: bool = False  # join other hosts, which share the folder of --out
    out: LocalPath = "samples.png"  # a .png, .gif or .npz; without a folder, in WORKDIR_OR_WEIGHTS


def run(options: Sample) -> Path:
    """Draws what the options ask for and returns the file it wrote. Raises InputError."""
    connect_hosts(options.distributed, "--distributed")
    with refused_together(options.distributed):
        check_value("workdir", options.workdir, LocalPath)
        workdir, step, damaged = intact.find(Path(options.workdir), options.step)
        options = dataclasses.replace(options, workdir=str(workdir), step=step)
        config = intact.stored_config(workdir, step)
        class_names = tuple(intact.stored_dataset(workdir, step)["class_names"])
        options = complete(options, config)
        check(options, config)
        options, guide_damaged = with_guide(options, config)
        option = "--interpolate" if options.interpolate else "--classes"
        words = options.interpolate or options.classes
        numbers = [class_number(option, word, class_names) for word in words]

    # what follows needs jax, which takes a second to import
    import jax

    from dit import checkpoint, generation
    from dit.imagenet.vae import load_vae
    from dit.progress import say
    from dit.sharding import local_mesh, replicated

    for line in damaged + guide_damaged:
        say(line)
    mesh = local_mesh()  # each host draws on its own
    with refused_together(options.distributed):
        vae = load_vae(options.vae, config.data.latent_scale) if options.vae else None
        vae = jax.device_put(vae, replicated(mesh))
        mask = read_mask(options, config)
        style = read_style(options, config, vae) if options.style else None
    out = Path(options.out)
    at_most = len(class_names) if out.suffix == ".npz" else 10
    classes = np.array(numbers or generation.spread_classes(len(class_names), at_most), np.int32)
    if options.interpolate:
        labels = generation.mixtures(*classes, options.per_class, len(class_names))
    elif options.num_samples is None:
        labels = classes.repeat(options.per_class)
    else:
        labels = generation.draw_labels(options.labels, options.seed, classes, options.num_samples)

    ema = options.ema if options.ema_decay is None else options.ema_decay
    with ended_together(options.distributed):  # each reads the weights and waits for all
        model, config = checkpoint.load(workdir, ema, replicated(mesh), options.dtype, step)
        guide = None
        if options.guide_with:
            folder = Path(options.guide_with)  # known to be intact
            source, number = folder.parent.parent, int(folder.name)
            guide, _ = checkpoint.load(source, True, replicated(mesh), options.dtype, number)
    draw = generation.make_draw(
        config,
        mesh,
        generation.make_condition(labels, config, mask),
        options.batch_size,
        sampler=options.sampler,
        steps=options.steps,
        guidance=options.guidance,
        eta=options.eta,
        cfg_channels=options.cfg_channels,
        guidance_interval=options.guidance_interval,
        seed=options.seed,
        style=style,
        style_strength=options.style_strength,
        guide=guide,
        frames=options.frames,
        same_noise=options.interpolate is not None,
    )
    if out.suffix == ".npz":
        distributed = options.distributed
        with claimed_parts(options, classes) as parts, ended_together(distributed):
            generation.draw_npz(draw, model, vae, labels, options.batch_size, out, parts)
    elif jax.process_index() == 0:
        images = generation.draw_all(draw, model, vae, len(labels), options.batch_size)
        names = generation.short_names(classes, class_names)
        save_picture(out, images, names, options, config)
    say(f"wrote {out}")
    return out


# What the options ask for


def complete(options: Sample, config: Config) -> Sample:
    """The options, with what they leave open taken from the run's config or their --out."""
    has_folder = os.path.dirname(options.out) != ""
    is_gif = options.out.endswith(".gif")
    frames = options.frames or (GIF_FRAMES if is_gif else None)
    is_strip = frames is not None and not is_gif and not options.interpolate
    return dataclasses.replace(
        options,
        out=options.out if has_folder else str(Path(options.workdir) / options.out),
        frames=frames,
        per_class=options.per_class or (1 if is_strip else 8),
        vae=options.vae or config.data.vae,
        sampler=options.sampler or config.sampler,
        steps=options.steps or config.train.sample_steps,
    )


# Options that do nothing without another one, and what is asked of that
NEEDS = {
    "cfg_channels": ("guidance", "a --guidance other than 1"),
    "guidance_interval": ("guidance", "a --guidance other than 1"),
    "guide_with": ("guidance", "a --guidance other than 1"),
    "labels": ("num_samples", "--num-samples"),
    "resize_mask": ("mask", "--mask"),
    "style_strength": ("style", "--style"),
}


def check(options: Sample, config: Config) -> None:
    """Raises InputError for what the model of the config cannot do."""
    objective, channels = config.objective, config.input_shape[2]
    sampler = options.sampler
    guided, interval = options.cfg_channels, options.guidance_interval
    is_flow = objective.name == "flow"
    check_sampler("--sampler", sampler, objective)
    check_steps("--steps", options.steps, objective)
    is_ddims = options.eta == 0 or sampler == "ddim"
    require(is_ddims, "--eta", options.eta, f"0 with --sampler {sampler}: only ddim has it")
    fits = guided is None or guided <= channels
    require(fits, "--cfg-channels", guided, f"from 1 to {channels}")
    rises = interval is None or interval[0] < interval[1]
    require(rises, "--guidance-interval", interval, "LOW and a HIGH above it")
    meets_times = not is_flow or interval is None or interval[0] < 1
    require(meets_times, "--guidance-interval", interval, "of times of flow, from 0 to 1")
    for field, (needed, words) in NEEDS.items():
        value = getattr(options, field)
        is_there = getattr(options, needed) != getattr(Sample, needed)
        is_used = value == getattr(Sample, field) or is_there
        require(is_used, f"--{field.replace('_', '-')}", value, f"given with {words}")

    out, num_samples = Path(options.out), options.num_samples
    is_known = out.suffix in (".png", ".gif", ".npz")
    require(is_known, "--out", options.out, "a .png, .gif or .npz file")
    require(out.parent.is_dir(), "--out", options.out, f"in a folder that exists, not {out.parent}")
    can_write = os.access(out.parent, os.W_OK) and not out.is_dir()
    require(can_write, "--out", options.out, "a file that can be written")
    is_npz = num_samples is None or out.suffix == ".npz"
    require(is_npz, "--num-samples", num_samples, "given with an --out that ends in .npz")
    interpolate, frames = options.interpolate, options.frames
    for name, value in [("--interpolate", interpolate), ("--frames", frames)]:
        is_drawn = value is None or out.suffix != ".npz"
        require(is_drawn, name, value, "given with an --out that ends in .png or .gif")
    is_alone = interpolate is None or not options.classes
    require(is_alone, "--classes", " ".join(options.classes), "left out with --interpolate")
    is_way = interpolate is None or options.per_class > 1
    require(is_way, "--per-class", options.per_class, "more than 1 with --interpolate")

    decay, decays = options.ema_decay, tuple(config.optim.averages.values())
    is_one = decay is None or decay in decays
    require(is_one, "--ema-decay", decay, f"one of the run's, {', '.join(map(str, decays))}")
    is_used = decay is None or options.ema
    require(is_used, "--ema-decay", decay, "left out with --no-ema")

    has_masks = options.mask is None or config.data.mask_classes > 0
    require(has_masks, "--mask", options.mask, "left out: the model was trained without masks")
    if config.data.latents:
        require(options.vae, "--vae", options.vae, "the folder of a VAE: the model makes latents")
    else:
        unused = options.vae is None
        require(unused, "--vae", options.vae, "left out: the model makes pixels, not latents")


# What a guide has to have in common with the model that it guides
SHARED = ["input_shape", "data.num_classes", "data.mask_classes", "data.latent_scale"]
SHARED += ["objective.name", "objective.num_steps", "objective.schedule", "objective.prediction"]
SHARED += ["objective.learns_variance"]


def with_guide(options: Sample, config: Config) -> tuple[Sample, list[str]]:
    """The options, whose guide_with is a checkpoint's folder now, and a line on each damaged one.

    Raises InputError for a model that does not see or predict what the config's does.
    """
    option, name = "--guide-with", options.guide_with
    if name is None:
        return options, []
    is_step = re.fullmatch("[0-9]+", name)
    path, step = (options.workdir, int(name)) if is_step else (name, None)
    with naming(Path(option)):
        folder, step, damaged = intact.find(Path(path), step)
    guides = intact.stored_config(folder, step)
    for field in SHARED:
        ours, theirs = operator.attrgetter(field)(config), operator.attrgetter(field)(guides)
        require(ours == theirs, f"{option}: {field}", theirs, f"the guided model's {ours!r}")
    guide_with = str(intact.step_folder(folder, step))
    return dataclasses.replace(options, guide_with=guide_with), damaged


def class_number(option: str, word: str, class_names: tuple[str, ...]) -> int:
    """The class that a number or a name means. Raises InputError, which names the option.

    Names may hold synonyms, separated by commas; each of them is a name too. A name that is itself
    a number goes before the number.
    """
    count = len(class_names)
    numbers: dict[str, list[int]] = {}
    for k, name in enumerate(class_names):
        for synonym in {name.casefold(), *name.casefold().split(", ")}:
            numbers.setdefault(synonym, []).append(k)
    matches = numbers.get(word.casefold())
    if matches is None and re.fullmatch("-?[0-9]+", word):
        number = int(word)
        expected = f"from 0 to {count - 1}: the model has {count} classes"
        require(0 <= number < count, option, number, expected)
        return number
    if matches is None:
        hint = nearest(word, numbers)
        expected = f"a number from 0 to {count - 1} or the name of a class{hint}"
        raise InputError(f"{option}: {word!r} should be {expected}")
    choices = ", ".join(f"{k} ({class_names[k]})" for k in matches)
    require(len(matches) == 1, option, word, f"one of the numbers {choices}")
    return matches[0]


# What is drawn


def save_picture(
    out: Path, images: np.ndarray, names: list[str], options: Sample, config: Config
) -> None:
    """Writes images `[N, H, W, C]`, or with frames `[N, F, H, W, C]`, of classes of these names."""
    from dit import generation
    from dit.images import save_gif, save_grid

    row_names, column_names = names, None
    sample_names = np.repeat(names, options.per_class).tolist()
    if options.interpolate:
        shares = np.linspace(0, 1, options.per_class)[1:-1]
        sample_names = [names[0], *[f"{share:.0%}" for share in shares], names[1]]
        row_names, column_names = [""], sample_names
    if options.frames is None:
        save_grid(out, images, row_names, column_names)
        return
    levels = generation.noise_levels(config, options.steps, options.frames)
    level_names = [f"noise {level:.2f}" for level in levels]
    if out.suffix == ".gif":
        save_gif(out, images.swapaxes(0, 1), row_names, level_names)
    else:
        save_grid(out, images.reshape(-1, *images.shape[2:]), sample_names, level_names)


# Pictures that condition the samples


def read_mask(options: Sample, config: Config) -> np.ndarray | None:
    """The labels of a picture, uint8 `[H, W]`, None if there is none. Raises InputError."""
    from dit.images import centre_crop, open_picture

    if options.mask is None:
        return None
    size, classes = config.data.image_size, config.data.mask_classes
    mask = open_picture("--mask", options.mask, "L", labels=True)  # [h, w, 1]
    height, width, _ = mask.shape
    fits = (height, width) == (size, size) or options.resize_mask
    expected = f"{size}x{size}, or be resized with --resize-mask"
    require(fits, "--mask", f"{width}x{height}", expected)
    mask = centre_crop(mask, size, labels=True)[..., 0]
    if classes == 2:
        mask = np.where(mask == 255, 1, mask)  # black and white serve as 0 and 1
    expected = f"labels from 0 to {classes - 1}: the model's masks have {classes} classes"
    require(mask.max() < classes, "--mask", int(mask.max()), expected)
    return mask.astype(np.uint8)


def read_style(options: Sample, config: Config, vae: Any) -> Any:
    """A picture as the sampler sees it, `[1, h, w, C]`: pixels in [-1, 1], or scaled latents.

    Raises InputError.
    """
    import jax
    import jax.numpy as jnp

    from dit.images import centre_crop, from_uint8, open_picture
    from dit.progress import say

    is_grey = config.data.channels == 1
    image = open_picture("--style", options.style, "L" if is_grey else "RGB")
    if not is_grey and (image == image[..., :1]).all():
        say(f"--style: {options.style!r} is grey, and so will the samples be on average")
    if vae is None:
        return from_uint8(jnp.asarray(image))[None]
    cropped = centre_crop(image, config.data.image_size)
    encode = jax.jit(lambda vae, x: vae.encode(x)[0])
    return config.data.latent_scale * encode(vae, from_uint8(jnp.asarray(cropped))[None])


# Parts of an .npz


@contextlib.contextmanager
def claimed_parts(options: Sample, classes: np.ndarray) -> Iterator[Path]:
    """A folder for the parts of --out, which only the same request resumes; removed at the end."""
    import jax

    out = Path(options.out)
    pictures = [options.mask, options.style]
    request = dataclasses.asdict(options) | {
        "out": out.name,
        "classes": classes.tolist(),
        "pictures": [zlib.crc32(Path(path).read_bytes()) for path in pictures if path],
    }
    folder = Path(options.out + ".parts")
    with refused_together(options.distributed):
        if jax.process_index() == 0:
            claim_folder(folder, request, "--out")
    with refused_together(options.distributed):
        require(folder.is_dir(), "--out", options.out, "in a folder that all hosts share")
    yield folder
    if jax.process_index() == 0:
        finished = out.with_name(out.name + ".done")  # no parts, even if killed here
        shutil.rmtree(finished, ignore_errors=True)
        shutil.rmtree(folder.rename(finished))


if __name__ == "__main__":
    cli.use_compilation_cache()
    with cli.exit_status("sample.py"):
        with command_refused_together(cli.joins_hosts(sys.argv[1:])):
            OPTIONS = cli.parse(Sample, sys.argv[1:], "sample.py", __doc__)
        run(OPTIONS)
