"""The configuration: frozen dataclasses, each default in exactly one place, and every check of them.

A preset is a Python file that defines `config = Config(...)`; any field of it can be set on the command line.
The comment behind a field is its text in `--help`.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import operator
import re
import runpy
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class InputError(ValueError):
    """What a user gave cannot be used. The message is one line: the field, its value, and what would be right."""


@dataclass(frozen=True)
class Model:
    hidden_size: int = 384  # width D of a token, in channels
    depth: int = 12  # number of blocks
    num_heads: int = 6  # attention heads; divides hidden_size
    patch_size: int = 2  # side of a patch, in pixels (in latent pixels where data.latents)
    mlp_ratio: float = 4.0  # width of the MLP, as a multiple of hidden_size
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] = "adaln_zero"  # how t and y enter a block
    remat: bool = False  # recompute each block in the backward pass: less memory, about a third more compute


@dataclass(frozen=True)
class Objective:
    num_steps: int = 1000  # timesteps T of the diffusion
    schedule: Literal["linear", "cosine"] = "linear"  # noise schedule
    variance: Literal["learned_range", "fixed_small", "fixed_large"] = "learned_range"  # of the reverse process
    min_snr_gamma: float | None = None  # weigh the squared error by min(SNR, gamma) / SNR; None weighs all timesteps alike
    label_dropout: float = 0.1  # probability of the null class in place of the label, for classifier-free guidance
    mask_dropout: float = 0.2  # probability of no mask where the model has one; the label is dropped only where the mask is


@dataclass(frozen=True)
class Data:
    name: str = "digits"  # `digits` (embedded), or any TFDS image set with a label
    split: str = "train"  # TFDS split, such as `train` or `train[:90%]`
    image_size: int = 8  # side, in pixels; other sizes are centre-cropped and resized
    channels: int = 1  # colours of an image: 1 or 3
    num_classes: int = 10  # labels are 0 .. num_classes - 1; num_classes itself is the null class
    latents: str | None = None  # folder of VAE latents of these images, by dit.latents; None trains on pixels
    latent_scale: float = 0.18215  # what makes the latents' standard deviation about 1
    vae: str | None = None  # folder of the VAE that turns latents into pictures; None draws no sample grids of latents
    flip: bool = False  # mirror each image with probability 1/2
    mask_classes: int = 0  # classes of a layout mask that conditions the model beside the label; 0 has no mask
    class_names: tyro.conf.Suppress[tuple[str, ...]] = ()  # filled in from the data set


@dataclass(frozen=True)
class Optim:
    learning_rate: float = 1e-4  # peak learning rate of AdamW
    warmup_steps: int = 0  # steps of linear warm-up from 0
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine falls to 0 at train.steps
    beta1: float = 0.9  # decay of Adam's first moment
    beta2: float = 0.999  # decay of Adam's second moment
    weight_decay: float = 0.0  # decoupled weight decay
    grad_clip: float | None = None  # largest global norm of the gradient; None does not clip
    accumulate: int = 1  # parts in which a batch is computed one after the other, to save memory
    ema_decay: float = 0.9999  # of the average of the weights, warmed up as min(decay, (1 + n) / (10 + n))


@dataclass(frozen=True)
class Mesh:
    data: int = -1  # devices that share the batch; -1 is all that fsdp leaves
    fsdp: int = 1  # devices that share the batch and the parameters
    distributed: bool = False  # several hosts: call jax.distributed.initialize() first


@dataclass(frozen=True)
class Train:
    steps: int = 400_000  # optimizer steps
    batch_size: int = 256  # images a step, over all devices and hosts
    seed: int = 0  # of everything random
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; parameters, norms, softmax, loss stay float32
    log_every: int = 100  # steps between two lines of metrics.jsonl
    sample_every: int = 10_000  # steps between two sample grids; 0 draws none
    checkpoint_every: int = 10_000  # steps between two checkpoints; the last step always gets one
    keep_last: int = 3  # newest checkpoints kept
    keep_every: int = 100_000  # checkpoints at multiples of this step are kept for good; 0 keeps none
    sampler: Literal["ddpm", "ddim"] = "ddim"  # of the sample grids
    sample_steps: int = 50  # denoising steps of the sample grids
    guidance: float = 2.0  # guidance scale of the sample grids; 1 is none
    wandb: bool = False  # log to Weights & Biases too (needs the `wandb` extra)
    workdir: Annotated[str | None, tyro.conf.arg(aliases=("--workdir",))] = None  # where the run is kept; None is runs/NAME


@dataclass(frozen=True)
class Eval:
    every: int = 0  # steps between two measurements of FID and its kin on samples of the averaged weights; 0 makes none
    inception: str | None = None  # the Inception weights that pytorch-fid publishes
    reference: str | None = None  # statistics (.npz) or the name of a data set; None is the data set trained on
    num_samples: int = 10_000  # samples drawn; FID falls with their number, and 50,000 are usual
    guidance: float = 1.0  # guidance scale; 1 is none
    batch_size: int = 256  # samples at a time, over all devices


@dataclass(frozen=True)
class Config:
    name: str = "dit"  # of the run
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
        size, channels = (self.data.image_size // 8, 4) if self.data.latents else (self.data.image_size, self.data.channels)
        return size, size, channels

    def validate(self) -> "Config":
        """Returns itself, or raises InputError for the first field that cannot be."""
        check_types(self)
        m, o, d, p, t, e = self.model, self.objective, self.data, self.optim, self.train, self.eval
        side = self.input_shape[0]
        for name, value in {"model.hidden_size": m.hidden_size, "model.depth": m.depth, "model.num_heads": m.num_heads,
                            "model.patch_size": m.patch_size, "objective.num_steps": o.num_steps, "data.image_size": d.image_size,
                            "data.num_classes": d.num_classes, "optim.accumulate": p.accumulate, "mesh.fsdp": self.mesh.fsdp,
                            "train.steps": t.steps, "train.batch_size": t.batch_size, "train.log_every": t.log_every,
                            "train.keep_last": t.keep_last, "train.sample_steps": t.sample_steps, "data.latent_scale": d.latent_scale,
                            "eval.num_samples": e.num_samples, "eval.batch_size": e.batch_size}.items():
            require(value > 0, name, value, "more than 0")
        require(d.channels in (1, 3), "data.channels", d.channels, "1 or 3")
        require(m.hidden_size * m.mlp_ratio >= 1, "model.mlp_ratio", m.mlp_ratio, "large enough for one channel")
        require(0 <= t.seed < 2**32, "train.seed", t.seed, "from 0 to 2^32 - 1")
        for name, value in {"optim.warmup_steps": p.warmup_steps, "optim.learning_rate": p.learning_rate, "optim.weight_decay":
                            p.weight_decay, "train.sample_every": t.sample_every, "train.checkpoint_every": t.checkpoint_every,
                            "train.keep_every": t.keep_every, "eval.every": e.every}.items():
            require(value >= 0, name, value, "0 or more")
        for name, value in {"optim.beta1": p.beta1, "optim.beta2": p.beta2, "optim.ema_decay": p.ema_decay}.items():
            require(0 <= value < 1, name, value, "from 0 to below 1")
        for name, value in {"objective.label_dropout": o.label_dropout, "objective.mask_dropout": o.mask_dropout}.items():
            require(0 <= value <= 1, name, value, "a probability, from 0 to 1")
        require(0 <= d.mask_classes <= 255, "data.mask_classes", d.mask_classes, "from 0 to 255")
        require(not d.mask_classes or m.conditioning in ("adaln_zero", "adaln"), "data.mask_classes", d.mask_classes,
                f"0 with model.conditioning = {m.conditioning!r}, which cannot vary in space")
        require(not d.mask_classes or o.mask_dropout >= o.label_dropout, "objective.mask_dropout", o.mask_dropout,
                f"at least objective.label_dropout, {o.label_dropout}, so that guidance learns what neither says")
        require(not d.mask_classes or not d.latents, "data.mask_classes", d.mask_classes, "0 with data.latents, which carry no masks")
        require(o.min_snr_gamma is None or o.min_snr_gamma > 0, "objective.min_snr_gamma", o.min_snr_gamma, "more than 0, or None")
        require(p.grad_clip is None or p.grad_clip > 0, "optim.grad_clip", p.grad_clip, "more than 0, or None")
        require(o.schedule == "cosine" or o.num_steps > 20, "objective.num_steps", o.num_steps, "more than 20 with the linear schedule")
        require(not d.latents or d.image_size % 8 == 0, "data.image_size", d.image_size, "a multiple of 8, the VAE's factor")
        require(d.vae is None or d.latents, "data.vae", d.vae, "given with data.latents: pixels need none")
        require(side % m.patch_size == 0, "data.image_size", d.image_size,
                f"a multiple of model.patch_size = {m.patch_size}" + " times the VAE's 8" * bool(d.latents))
        require(m.hidden_size % m.num_heads == 0, "model.hidden_size", m.hidden_size, f"a multiple of model.num_heads = {m.num_heads}")
        require(m.hidden_size % 4 == 0, "model.hidden_size", m.hidden_size, "a multiple of 4, for the sin-cos positions")
        require(t.batch_size % p.accumulate == 0, "train.batch_size", t.batch_size, f"a multiple of optim.accumulate = {p.accumulate}")
        require(t.sample_steps <= o.num_steps, "train.sample_steps", t.sample_steps, f"at most objective.num_steps = {o.num_steps}")
        require(not e.every or e.inception, "eval.inception", e.inception, "the weights file of pytorch-fid, where eval.every is set")
        require(not e.every or not d.latents or d.vae, "data.vae", d.vae, "the folder of a VAE, where eval.every is set for latents")
        require(not e.every or not d.latents or e.reference, "eval.reference", e.reference, "given for latents, which are no images")
        require(e.num_samples > 1, "eval.num_samples", e.num_samples, "more than 1")
        require(not t.wandb or importlib.util.find_spec("wandb"), "train.wandb", t.wandb, "False, or wandb be installed")
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def one_line(error: Exception) -> str:
    """What another library's exception says, as a part of an InputError's line."""
    return " ".join(str(error).split())


def require(condition: bool, name: str, value, expected: str) -> None:
    if not condition:
        raise InputError(f"{name}: {value!r} should be {expected}")


def check_types(node, prefix: str = "") -> None:
    """Holds every field against its annotation: a config file, unlike the command line, can hold anything."""
    for name, hint in typing.get_type_hints(type(node)).items():
        value, kind = getattr(node, name), typing.get_origin(hint)
        if dataclasses.is_dataclass(hint):
            require(isinstance(value, hint), prefix + name, value, f"a {hint.__name__}(...)")
            check_types(value, f"{prefix}{name}.")
        elif kind is Literal:
            require(value in typing.get_args(hint), prefix + name, value, "one of " + ", ".join(typing.get_args(hint)))
        else:
            allowed = typing.get_args(hint) if kind is types.UnionType else (kind or hint,)
            fits = isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))
            fits = fits or (float in allowed and type(value) is int)
            require(fits, prefix + name, value, "of type " + " or ".join(a.__name__ for a in allowed))


def differences(ours: Config, theirs: Config) -> list[str]:
    """What keeps a run of one config from going on under another: ["model.depth: 4, where 6 is stored", ...].

    Where a run computes, where its files lie, how it is split up, how long it lasts and what it says may change; what it computes may not.
    """
    names = [f"{s}.{f.name}" for s in ("model", "objective", "data", "optim") for f in dataclasses.fields(getattr(ours, s))]
    names += ["input_shape", "train.batch_size", "train.seed", "train.dtype"] + ["train.steps"] * (ours.optim.schedule == "cosine")
    found = []
    for name in [name for name in names if name not in ("model.remat", "optim.accumulate", "data.latents", "data.vae")]:
        a, b = (operator.attrgetter(name)(config) for config in (ours, theirs))
        found += [f"{name}: {a!r}, where {b!r} is stored"] if a != b else []
    return found


def from_json(text: str) -> Config:
    """The config that `to_json` wrote."""
    values = json.loads(text)
    sections = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.name != "name"}
    values["data"]["class_names"] = tuple(values["data"]["class_names"])
    return Config(name=values["name"], **{name: section(**values.get(name, {})) for name, section in sections.items()})


def preset_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def load(name_or_file: str) -> Config:
    """The config of a preset's name or of a Python file. Raises InputError."""
    presets = preset_names()
    path = Path(name_or_file) if name_or_file.endswith(".py") else CONFIGS / f"{name_or_file}.py"
    if not path.is_file():
        near = difflib.get_close_matches(name_or_file, presets, n=1, cutoff=0)
        raise InputError(f"preset: {name_or_file!r} is neither a preset nor a Python file; the nearest preset is {near[0]!r} "
                         f"of {', '.join(presets)}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # whatever a user's file does
        raise InputError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    require(isinstance(config, Config), f"{path}: config", config, "a Config(...)")
    check_types(config)
    return config


def parse(kind, argv: list[str], prog: str, description: str, default=tyro.MISSING_NONPROP):
    """A dataclass from a command line. Raises InputError with tyro's whole answer in one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(kind, args=argv, prog=prog, description=description, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
    lines = [re.sub(r"[╭─╮│╰╯]+|-{4,}", " ", line).strip(" |+") for line in told.getvalue().splitlines()[1:]]  # the box around it
    line = " ".join(" ".join(lines).split())
    raise InputError(re.sub(r"(Argument helptext:|For full helptext).*", f"(see {prog} --help)", line))


def from_command_line(argv: list[str], prog: str, description: str) -> Config:
    """The config of `PRESET_OR_FILE.py [--section.field value ...]`. Raises InputError."""
    if argv and not argv[0].startswith("-"):
        return parse(tyro.conf.FlagConversionOff[Config], argv[1:], f"{prog} {argv[0]}", description, default=load(argv[0]))
    parse(tyro.conf.FlagConversionOff[Config], argv, f"{prog} PRESET_OR_FILE.py", description)  # answers --help
    raise InputError(f"preset: missing; it should come first, one of {', '.join(preset_names())}, or a Python file")


@contextlib.contextmanager
def input_errors(prog: str):
    """Turns an InputError into one line on stderr and exit status 2."""
    try:
        yield
    except InputError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(2)
