"""What a run consists of: the step, the model, its average, the optimizer's memory; and how they are made from a config."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dit.config import Config, Optim
from dit.ddpm import DDPM
from dit.model import DiT
from dit.sharding import shardings, split_parts


@jax.tree_util.register_dataclass
@dataclass
class State:
    step: jax.Array  # int32, optimizer steps taken
    model: DiT
    ema: DiT  # exponential moving average of the model
    opt_state: optax.OptState


def make_model(config: Config, key: jax.Array) -> DiT:
    m = config.model
    return DiT(input_size=config.input_shape[0], in_channels=config.input_shape[2], num_classes=config.data.num_classes,
               patch_size=m.patch_size, hidden_size=m.hidden_size, depth=m.depth, num_heads=m.num_heads, mlp_ratio=m.mlp_ratio,
               conditioning=m.conditioning, remat=m.remat, learn_sigma=config.objective.variance == "learned_range",
               mask_classes=config.data.mask_classes,
               dtype=jnp.dtype(config.train.dtype), rngs=nnx.Rngs(params=key))


def run_keys(config: Config) -> tuple[jax.Array, jax.Array]:
    """The key of the initial parameters, and the key that each step folds its number into."""
    return tuple(jax.random.split(jax.random.key(config.train.seed)))


def make_objective(config: Config) -> DDPM:
    o = config.objective
    return DDPM(o.num_steps, o.schedule, o.variance, o.min_snr_gamma)


def learning_rate(config: Optim, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, or a half cosine down to 0 at the last step."""
    after = optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup_steps, 1))
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after


def make_optimizer(config: Optim, steps: int) -> optax.GradientTransformation:
    """AdamW, behind a clip of the global norm where one is asked for."""
    adamw = optax.adamw(learning_rate(config, steps), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)
    return adamw if config.grad_clip is None else optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)


def update_ema(ema: DiT, model: DiT, step: jax.Array, decay: float) -> DiT:
    """ema d + model (1 - d), where d = min(decay, (1 + step) / (10 + step)): early on, the average follows the model."""
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), ema, model)


def mean_over_parts(f, batch, parts: int):
    """f's mean over `parts` equal parts of a batch, computed one after the other; leaves of the batch are `[B, ...]`."""
    if parts == 1:
        return f(batch)
    batch = split_parts(batch, parts)  # [parts, B / parts, ...]
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(f, jax.tree.map(lambda a: a[0], batch)))
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, f(part)), None), zeros, batch)
    return jax.tree.map(lambda a: a / parts, total)


def make_init(config: Config):
    """The function () -> State of step 0."""
    def init() -> State:
        model = make_model(config, run_keys(config)[0])
        ema = jax.tree.map(jnp.copy, model)
        return State(jnp.int32(0), model, ema, make_optimizer(config.optim, config.train.steps).init(model))

    return init


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> State:
    """Shapes, types and shardings of the state, nothing computed: the target of a restore."""
    shapes = jax.eval_shape(make_init(config))
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        shapes, shardings(shapes, mesh))


def make_state(config: Config, mesh: jax.sharding.Mesh) -> State:
    """The state of step 0, made on the devices that hold it."""
    init = make_init(config)
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init), mesh))()
