"""What a run consists of, and how it is made from a config."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dit.config import AUGMENT_SIZE, Config, Optim, require
from dit.ddpm import DDPM
from dit.flow import Flow
from dit.model import DiT
from dit.sharding import shardings


@jax.tree_util.register_dataclass
@dataclass
class State:
    step: jax.Array  # int32, optimizer steps taken
    model: DiT
    emas: tuple[DiT, ...]  # exponential moving averages of the model, one a decay
    opt_state: optax.OptState

    @property
    def ema(self) -> DiT:
        """The average that is drawn and judged."""
        return self.emas[0]


def run_keys(config: Config) -> tuple[jax.Array, jax.Array]:
    """The key of the initial parameters, and the key that each step folds its number into."""
    init_key, step_key = jax.random.split(jax.random.key(config.train.seed))
    return init_key, step_key


def make_model(config: Config, key: jax.Array) -> DiT:
    """The model of a config. Raises InputError for one that leaves the number of classes open."""
    classes = config.data.num_classes
    require(classes, "data.num_classes", classes, "given here, where no data set is opened")
    side, _, channels = config.input_shape
    model = config.model
    return DiT(
        input_size=side,
        patch_size=model.patch_size,
        in_channels=channels,
        hidden_size=model.hidden_size,
        depth=model.depth,
        num_heads=model.num_heads,
        num_classes=classes,
        mlp_ratio=model.mlp_ratio,
        learn_sigma=config.objective.learns_variance,
        conditioning=model.conditioning,
        mask_classes=config.data.mask_classes,
        augment_size=AUGMENT_SIZE if config.data.augment else 0,
        dtype=jnp.dtype(config.train.dtype),
        remat=model.remat,
        rngs=nnx.Rngs(params=key),
    )


def abstract_model(config: Config) -> DiT:
    """Shapes and types of a model's parameters, without its arrays."""
    return jax.eval_shape(lambda: make_model(config, jax.random.key(0)))


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """{"blocks.mlp.up.kernel.value": ..., ...}, in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def make_objective(config: Config) -> DDPM | Flow:
    objective = config.objective
    if objective.name == "flow":
        return Flow(objective.prediction, objective.times, objective.time_mean, objective.time_std)
    return DDPM(
        objective.num_steps, objective.schedule, objective.variance, objective.min_snr_gamma
    )


def learning_rate(config: Optim, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, or a half cosine to 0 at the last step."""
    peak, warmup_steps = config.learning_rate, config.warmup_steps
    schedule = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1))
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, peak, warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [warmup_steps])
    return schedule


def make_optimizer(config: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW or Muon, after a clip of the global norm where there is one."""
    make = muon if config.name == "muon" else optax.adamw
    optimizer = make(schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)
    if config.grad_clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), optimizer)


def muon(
    schedule: optax.Schedule, b1: float, b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """Muon for the blocks' kernels `[L, in, out]`, each layer's apart, and AdamW for the rest.

    Both have Nesterov's momentum. Muon's updates are as large as Adam's, so that one learning rate
    serves both: of a kernel, 0.2 sqrt(max(in, out)) times an orthogonal matrix (Liu et al.,
    arXiv 2502.16982). With `mesh.fsdp` each of its five iterations sums a `[L, D, D]` over the
    devices for every kernel.
    """

    def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        is_kernel = "blocks" in jax.tree_util.keystr(path) and leaf.ndim == 3
        return optax.contrib.MuonDimensionNumbers(1, 2) if is_kernel else None

    return optax.contrib.muon(
        schedule,
        adam_b1=b1,
        adam_b2=b2,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=lambda model: jax.tree.map_with_path(axes, model),
        consistent_rms=0.2,
    )


def update_ema(ema: DiT, model: DiT, step: jax.Array, decay: float) -> DiT:
    """ema d + model (1 - d), where d = min(decay, (1 + step) / (10 + step)).

    So early on the average follows the model closely.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), ema, model)


def make_init(config: Config) -> Callable[[], State]:
    """The function that makes the state of step 0."""
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, config.train.steps))

    def init() -> State:
        init_key, _ = run_keys(config)
        model = make_model(config, init_key)
        emas = tuple(jax.tree.map(jnp.copy, model) for _ in config.optim.averages)
        return State(jnp.int32(0), model, emas, optimizer.init(model))

    return init


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> State:
    """Shapes, types and shardings of the state, without its arrays."""
    shapes = jax.eval_shape(make_init(config))
    return with_shardings(shapes, shardings(shapes, mesh))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def make_state(config: Config, mesh: jax.sharding.Mesh) -> State:
    """The state of step 0, made on the devices that hold it."""
    init = make_init(config)
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init), mesh))()
