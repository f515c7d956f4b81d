"""The configuration: frozen dataclasses, each default and each range beside its field.

A preset is a Python file that defines `config = Config(...)`. The comment behind a field is its
text in `--help`. `Config.validate` checks every field, then the relations between fields.
"""

import dataclasses
import difflib
import importlib.util
import json
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

VAE_FACTOR = 8  # pixels of an image to one of its latents, along a side
LATENT_CHANNELS = 4
AUGMENT_SIZE = 5  # numbers that tell the network how an image was moved
MAX_SIDE = 4096  # of an image, in pixels
MAX_STEPS = 1_000_000  # of a diffusion or a sampler, whose tables hold a row for each

# The paper's twelve sizes (Peebles & Xie, Table 1)
PRESETS = {
    f"DiT-{size}/{patch_size}": dict(
        patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads
    )
    for size, depth, hidden_size, num_heads in [
        ("S", 12, 384, 6),
        ("B", 12, 768, 12),
        ("L", 24, 1024, 16),
        ("XL", 28, 1152, 16),
    ]
    for patch_size in (8, 4, 2)
}


# Errors that end a command


class InputError(ValueError):
    """Input that cannot be used. Its one line names the field, the value and what is right."""


class Diverged(RuntimeError):
    """The loss, its gradient or the state of a run is not finite any more."""


def diverged(what: str, folder: Path) -> Diverged:
    """The error of a run that keeps its checkpoints in a folder."""
    return Diverged(
        f"{what} should be finite; the checkpoints in {str(folder)!r} are from before it; the same "
        "command goes on from the newest, with a lower optim.learning_rate, or with optim.grad_clip"
    )


class Unsaved(RuntimeError):
    """A run has ended whose last checkpoint could not be written."""


class Stopped(Exception):
    """A signal has stopped a run where it has nothing to save."""


def require(condition: Any, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise InputError(f"{name}: {value!r} should be {expected}")


def one_line(error: Exception) -> str:
    """What another library's exception says, as a part of an InputError's line."""
    return " ".join(str(error).split())


def nearest(word: str, names: Iterable[str]) -> str:
    """What an error adds where one of the names was probably meant: "; the nearest is 'digits'"."""
    near = difflib.get_close_matches(word.casefold(), names, n=1, cutoff=0.7)
    return f"; the nearest is {near[0]!r}" if near else ""


# Types with a range


class Range(NamedTuple):
    contains: Callable[[Any], bool]
    words: str


POSITIVE = Range(lambda value: value > 0, "more than 0")
NON_NEGATIVE = Range(lambda value: value >= 0, "0 or more")

PositiveInt = Annotated[int, POSITIVE]
NonNegativeInt = Annotated[int, NON_NEGATIVE]
PositiveFloat = Annotated[float, POSITIVE]
NonNegativeFloat = Annotated[float, NON_NEGATIVE]
Probability = Annotated[float, Range(lambda value: 0 <= value <= 1, "a probability, from 0 to 1")]
Decay = Annotated[float, Range(lambda value: 0 <= value < 1, "from 0 to below 1")]
Seed = Annotated[int, Range(lambda value: 0 <= value < 2**32, "from 0 to 2^32 - 1")]
Byte = Annotated[int, Range(lambda value: 0 <= value <= 255, "from 0 to 255")]
Side = Annotated[int, Range(lambda value: 0 < value <= MAX_SIDE, f"from 1 to {MAX_SIDE}")]
DenoisingSteps = Annotated[
    int, Range(lambda value: 0 < value <= MAX_STEPS, f"from 1 to {MAX_STEPS}")
]
Timesteps = Annotated[int, Range(lambda value: 1 < value <= MAX_STEPS, f"from 2 to {MAX_STEPS}")]
Count = Annotated[int, Range(lambda value: 0 < value <= 10**7, "from 1 to 10 million")]
AtLeastTwo = Annotated[int, Range(lambda value: value > 1, "more than 1")]
LOCAL = Range(lambda path: "://" not in path, "a path of this host's file system, not of a bucket")
PATH = Range(lambda path: path != "" and "\0" not in path, "a path")
AnyPath = Annotated[str, PATH]
LocalPath = Annotated[str, PATH, LOCAL]
Workdir = Annotated[LocalPath | None, tyro.conf.arg(aliases=("--workdir",))]


# The sections


Remat = Literal["none", "dots", "full"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Sampler = Literal["ddpm", "ddim", "euler", "heun"]
Labels = Literal["random", "balanced"]
Course = Literal["constant", "cosine"]

# What one objective has and the other has not: samplers, the first its default, and fields
SAMPLERS = {"ddpm": ("ddim", "ddpm"), "flow": ("heun", "euler")}
PROTOCOL = {"ddpm": ("ddpm", 250), "flow": ("heun", 125)}  # sampler and steps of published FIDs
OWN_FIELDS = {
    "ddpm": ("num_steps", "schedule", "variance", "min_snr_gamma"),
    "flow": ("prediction", "times", "time_mean", "time_std"),
}


@dataclass(frozen=True)
class Model:
    hidden_size: PositiveInt = 384  # width D of a token, in channels
    depth: PositiveInt = 12  # number of blocks
    num_heads: PositiveInt = 6  # attention heads; their number divides hidden_size
    patch_size: PositiveInt = 2  # side of a patch, in pixels (in latent pixels where data.latents)
    mlp_ratio: PositiveFloat = 4.0  # width of the MLP, as a multiple of hidden_size
    conditioning: str = "adaln_zero"  # block: adaln_zero, adaln, cross_attention, in_context
    remat: Remat = "none"  # what of a block is computed twice: nothing, all but its dots, all of it


@dataclass(frozen=True)
class Objective:
    name: Literal["ddpm", "flow"] = "ddpm"  # denoising diffusion, or flow matching
    num_steps: Timesteps = 1000  # ddpm: timesteps T of the diffusion
    schedule: Literal["linear", "cosine"] = "linear"  # ddpm: noise schedule
    variance: Variance = "learned_range"  # ddpm: variance of the reverse process
    min_snr_gamma: PositiveFloat | None = None  # ddpm: weighs the error by min(SNR, gamma) / SNR
    prediction: Literal["v", "x0"] = "v"  # flow: what the network predicts; the loss is v's
    times: Literal["logit_normal", "uniform"] = "logit_normal"  # flow: how times are drawn
    time_mean: float = 0.0  # flow: mean of logit-normal times' logit; more is more noise
    time_std: PositiveFloat = 1.0  # flow: deviation of logit-normal times' logit
    label_dropout: Probability = 0.1  # probability that the label is left out, for guidance
    mask_dropout: Probability = 0.2  # probability that the mask is left out; includes label_dropout

    @property
    def learns_variance(self) -> bool:
        """Whether the network has outputs for the variance too."""
        return self.name == "ddpm" and self.variance == "learned_range"


@dataclass(frozen=True)
class Data:
    name: str = "digits"  # `digits`, a TFDS image set with a label, or a folder of class folders
    split: str = "train"  # split, such as `train`, `train[:90%]`, or `val` where a folder has it
    image_size: Side = 8  # side of an image, in pixels; others are cropped and resized
    channels: Literal[1, 3] = 1  # colour channels of an image
    num_classes: PositiveInt | None = None  # classes; None: as the data; label num_classes is null
    latents: AnyPath | None = None  # folder of VAE latents by dit.imagenet.latents; None is pixels
    latent_scale: PositiveFloat = 0.18215  # factor that makes the latents' deviation about 1
    vae: AnyPath | None = None  # folder of the VAE that decodes latents, for sample grids
    flip: bool = False  # mirror each image with probability 1/2
    augment: Probability = 0.0  # probability of a mirror, a turn, a shift, told to the network
    mask_classes: Byte = 0  # classes of a layout mask that conditions the model; 0 has no mask


@dataclass(frozen=True)
class Optim:
    name: Literal["adamw", "muon"] = "adamw"  # AdamW, or Muon for the blocks' kernels
    learning_rate: NonNegativeFloat = 1e-4  # peak learning rate
    warmup_steps: NonNegativeInt = 0  # steps of linear warm-up from 0
    schedule: Course = "constant"  # learning rate after warm-up; cosine falls to 0 at train.steps
    beta1: Decay = 0.9  # decay of Adam's first moment
    beta2: Decay = 0.999  # decay of Adam's second moment
    weight_decay: NonNegativeFloat = 0.0  # decoupled weight decay
    grad_clip: PositiveFloat | None = None  # largest global norm of the gradient; None is any
    accumulate: PositiveInt = 1  # equal parts of a batch, computed one after the other
    # decay of the averaged weights, at step n at most (1 + n) / (10 + n); of several averages the
    # first is drawn and judged
    ema_decay: Decay | tuple[Decay, ...] = 0.9999

    def __post_init__(self):
        if isinstance(self.ema_decay, list):  # as JSON has it
            object.__setattr__(self, "ema_decay", tuple(self.ema_decay))

    @property
    def averages(self) -> dict[str, float]:
        """The decay of each average by its name in checkpoints and metrics: ema, ema_0.99, ..."""
        first, *others = self.ema_decay if isinstance(self.ema_decay, tuple) else [self.ema_decay]
        return {"ema": first} | {f"ema_{decay}": decay for decay in others}


@dataclass(frozen=True)
class Mesh:
    data: int = -1  # devices that share the batch; -1 is all that fsdp leaves
    fsdp: PositiveInt = 1  # devices that share the batch and the parameters
    distributed: bool = False  # join other hosts first, by jax.distributed.initialize()


@dataclass(frozen=True)
class Train:
    steps: PositiveInt = 400_000  # optimizer steps of the run
    batch_size: PositiveInt = 256  # images a step, over all devices and hosts
    seed: Seed = 0  # seed of everything random
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # type of blocks' products; else float32
    log_every: PositiveInt = 100  # steps between two lines of metrics.jsonl
    sample_every: NonNegativeInt = 10_000  # steps between two sample grids; 0 draws none
    checkpoint_every: NonNegativeInt = 10_000  # steps between saves; the last and grids save too
    keep_last: PositiveInt = 3  # number of newest checkpoints that are kept
    keep_every: NonNegativeInt = 100_000  # checkpoints at multiples of this are kept for good
    sampler: Sampler | None = None  # sampler of the grids; None is ddim, or heun for flow
    sample_steps: DenoisingSteps = 50  # denoising steps of the grids; with heun two forwards each
    guidance: float = 2.0  # guidance scale of the sample grids; 1 is none
    profile_steps: NonNegativeInt = 0  # steps that JAX's profiler traces, after the first; 0: none
    wandb: bool = False  # log to Weights & Biases too (needs the `wandb` extra)
    init_from: AnyPath | None = None  # a run or weights; what fits of them a new run begins with
    workdir: Workdir = None  # folder of the run; None is runs/NAME


@dataclass(frozen=True)
class Eval:
    every: NonNegativeInt = 0  # steps between two measurements of FID and its kin; 0 makes none
    inception: AnyPath | None = None  # file of the Inception weights that pytorch-fid publishes
    reference: AnyPath | None = None  # real images: statistics (.npz) or a data set; None: its own
    num_samples: AtLeastTwo = 10_000  # samples drawn; FID falls with their number, 50,000 are usual
    labels: Labels = "random"  # classes of the samples: drawn at random, or equally many of each
    sampler: Sampler | None = None  # sampler; None is the paper's ddpm, or heun for flow
    steps: DenoisingSteps | None = None  # denoising steps; None gives the paper's 250 forwards
    guidance: float = 1.0  # guidance scale; 1 is none
    batch_size: PositiveInt = 256  # samples at a time, over all devices
    split: str | None = None  # split of other images, such as `test`, whose loss is measured
    loss_every: PositiveInt = 500  # steps between two measurements of the loss of eval.split


@dataclass(frozen=True)
class Config:
    name: str = "dit"  # name of the run, and of its folder in runs/
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    mesh: Mesh = field(default_factory=Mesh)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)

    @property
    def workdir(self) -> Path:
        return Path(self.train.workdir or Path("runs") / self.name)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what the network sees."""
        if self.data.latents:
            side = self.data.image_size // VAE_FACTOR
            return side, side, LATENT_CHANNELS
        return self.data.image_size, self.data.image_size, self.data.channels

    @property
    def sampler(self) -> str:
        """Of the run: train.sampler, or the objective's default."""
        return self.train.sampler or SAMPLERS[self.objective.name][0]

    @property
    def protocol(self) -> tuple[str, int]:
        """Sampler and steps of the evaluation: eval's, or the published ones."""
        sampler, steps = PROTOCOL[self.objective.name]
        if self.objective.name == "ddpm":
            steps = min(steps, self.objective.num_steps)
        return self.eval.sampler or sampler, self.eval.steps or steps

    def validate(self) -> "Config":
        """Returns itself. Raises InputError for the first field that cannot be."""
        check_fields(self)
        check_model(self)
        check_objective(self)
        check_masks(self)
        check_augmentation(self)
        check_evaluation(self)
        check_run(self)
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def from_json(values: dict[str, Any]) -> Config:
    """The config of the JSON object that `to_json` writes. Raises InputError.

    A field that is missing, as in an older version's, has its default.
    """
    config = from_fields(Config, values)
    replace(config, train=dict(wandb=False)).validate()  # it need not be installed here
    return config


def from_fields(kind: type, values: Any, prefix: str = "") -> Any:
    """A dataclass whose fields, and those of its sections, come from a JSON object."""
    require(isinstance(values, dict), prefix.rstrip("."), values, "an object of fields")
    hints = typing.get_type_hints(kind)
    fields = {}
    for name, value in values.items():
        require(name in hints, prefix + name, value, "left out: this version has no such field")
        is_section = dataclasses.is_dataclass(hints[name])
        section = f"{prefix}{name}."
        fields[name] = from_fields(hints[name], value, section) if is_section else value
    return kind(**fields)


def replace(config: Config, name: str | None = None, **sections: dict[str, Any]) -> Config:
    """The config with some fields changed, such as `replace(config, train=dict(steps=3))`."""
    changed = {
        section: dataclasses.replace(getattr(config, section), **changes)
        for section, changes in sections.items()
    }
    return dataclasses.replace(config, name=name or config.name, **changed)


# Each field on its own


def check_fields(section: Any, prefix: str = "") -> None:
    """Holds every field against its annotation: a config file can hold anything."""
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(hint):
            require(isinstance(value, hint), prefix + name, value, f"a {hint.__name__}(...)")
            check_fields(value, f"{prefix}{name}.")
        else:
            check_value(prefix + name, value, hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises InputError for a value that is not of its annotated type or not in its range."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        is_one = any(value == a and type(value) is type(a) for a in arguments)  # True == 1
        require(is_one, name, value, "one of " + ", ".join(map(str, arguments)))
    elif kind in (typing.Union, types.UnionType):  # each is `X | None` or `X | tuple[X, ...]`
        takes_several = typing.get_origin(arguments[1]) is tuple
        if takes_several and isinstance(value, tuple):
            require(value, name, value, "one or more")
            for each in value:
                check_value(name, each, arguments[0])
        elif takes_several or value is not None:
            check_value(name, value, arguments[0])
    elif kind is Annotated:
        check_value(name, value, arguments[0])
        for bound in arguments[1:]:
            if isinstance(bound, Range):
                require(bound.contains(value), name, value, bound.words)
    else:
        is_float = hint is float and type(value) is int
        is_type = isinstance(value, kind or hint)
        is_bool = isinstance(value, bool) and hint is not bool  # an int, to Python
        fits = is_float or (is_type and not is_bool)
        require(fits, name, value, f"of type {hint.__name__}")
        is_finite = hint not in (int, float) or abs(value) < 2.0**128  # in float32; nan is not
        require(is_finite, name, value, "a finite number")


# Relations between fields


def check_model(config: Config) -> None:
    width, heads = config.model.hidden_size, config.model.num_heads
    ratio, patch = config.model.mlp_ratio, config.model.patch_size
    size, latents = config.data.image_size, config.data.latents
    require(width * ratio >= 1, "model.mlp_ratio", ratio, "large enough for one channel")
    require(width % heads == 0, "model.hidden_size", width, f"a multiple of num_heads = {heads}")
    require(
        width % 4 == 0, "model.hidden_size", width, "a multiple of 4, for the sin-cos positions"
    )
    unit = patch * VAE_FACTOR if latents else patch
    factors = f"model.patch_size = {patch}" + (f" times the VAE's {VAE_FACTOR}" if latents else "")
    require(size % unit == 0, "data.image_size", size, f"a multiple of {factors}")


def check_objective(config: Config) -> None:
    objective = config.objective
    other = "flow" if objective.name == "ddpm" else "ddpm"
    for name in OWN_FIELDS[other]:
        value, default = getattr(objective, name), getattr(Objective, name)
        expected = f"left at {default!r}: it is {other}'s, and objective.name is {objective.name}"
        require(value == default, f"objective.{name}", value, expected)
    timesteps = objective.num_steps
    long_enough = objective.schedule == "cosine" or timesteps > 20
    require(long_enough, "objective.num_steps", timesteps, "more than 20 with the linear schedule")
    check_sampler("train.sampler", config.sampler, objective)
    check_steps("train.sample_steps", config.train.sample_steps, objective)
    sampler, steps = config.protocol
    check_sampler("eval.sampler", sampler, objective)
    check_steps("eval.steps", steps, objective)


def check_sampler(name: str, sampler: str, objective: Objective) -> None:
    samplers = SAMPLERS[objective.name]
    expected = f"{' or '.join(samplers)}: objective.name is {objective.name}"
    require(sampler in samplers, name, sampler, expected)


def check_steps(name: str, steps: int, objective: Objective) -> None:
    """Raises InputError for more denoising steps than the model has timesteps."""
    most = objective.num_steps if objective.name == "ddpm" else MAX_STEPS
    require(1 <= steps <= most, name, steps, f"from 1 to the model's {most} timesteps")


def check_masks(config: Config) -> None:
    masks = config.data.mask_classes
    mask_dropout, label_dropout = config.objective.mask_dropout, config.objective.label_dropout
    if masks == 0:
        return
    require(not config.data.latents, "data.mask_classes", masks, "0 with data.latents")
    enough = f"at least objective.label_dropout = {label_dropout}: a label goes with its mask"
    require(mask_dropout >= label_dropout, "objective.mask_dropout", mask_dropout, enough)


def check_augmentation(config: Config) -> None:
    augment, latents = config.data.augment, config.data.latents
    fits = augment == 0 or latents is None
    require(fits, "data.augment", augment, "0 with data.latents, which cannot be turned")


def check_evaluation(config: Config) -> None:
    latents, vae, evaluation = config.data.latents, config.data.vae, config.eval
    require(vae is None or latents, "data.vae", vae, "given with data.latents: pixels need none")
    held_out, trained_on = evaluation.split, config.data.split
    wholes = [split.partition("[")[0] for split in (trained_on, held_out or "")]
    is_apart = trained_on not in (held_out, wholes[1]) and held_out != wholes[0]
    expected = (
        f"of other images than data.split = {trained_on!r}, "
        "as 'train[90%:]' is with data.split = 'train[:90%]'"
    )
    require(is_apart, "eval.split", held_out, expected)
    if evaluation.every == 0:
        return
    inception, reference = evaluation.inception, evaluation.reference
    require(inception, "eval.inception", inception, "pytorch-fid's weights, with eval.every")
    require(vae or not latents, "data.vae", vae, "the folder of a VAE, with eval.every and latents")
    require(reference or not latents, "eval.reference", reference, "given: latents are no images")


def check_run(config: Config) -> None:
    train, parts = config.train, config.optim.accumulate
    batch_size, decays = train.batch_size, config.optim.ema_decay
    differ = not isinstance(decays, tuple) or len(set(decays)) == len(decays)
    require(differ, "optim.ema_decay", decays, "decays that differ")
    divides = batch_size % parts == 0
    require(divides, "train.batch_size", batch_size, f"a multiple of optim.accumulate = {parts}")
    installed = importlib.util.find_spec("wandb") is not None
    require(installed or not train.wandb, "train.wandb", True, "False, or wandb be installed")
