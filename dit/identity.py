"""The zero of adaLN-Zero, checked: python -m dit.identity PRESET_OR_FILE.py [--section.field value]

At initialisation every block is the identity, bit for bit, for any x, t and y, even where the
condition varies in space, and the model's output is zero. Then the gradient wakes the network in
three steps. Step 1 reaches the final linear layer alone: all behind it is multiplied by its zero
weights. Step 2 also reaches the final modulation, the patch embedding and the blocks' gates, and
step 3 everything. Exit status 0 if all of that holds, 1 if not.
"""

from dit.signals import StopRequest

if __name__ == "__main__":
    StopRequest().end_at_once("dit.identity")

import functools
import sys

from dit import cli
from dit.config import Config, replace

if __name__ == "__main__":  # --help and bad input are answered before jax is imported
    cli.use_compilation_cache()
    with cli.exit_status("dit.identity"):
        CONFIG = cli.parse_config(sys.argv[1:], "python -m dit.identity", __doc__)

import jax
import jax.numpy as jnp

from dit.model import DiT
from dit.state import make_model, make_objective

BATCH = 2
LEARNING_RATE = 0.1

# What the gradient reaches, in the order in which it wakes
GROUPS = [
    "final linear layer",
    "final modulation",
    "patch embedding",
    "block gates",
    "block shifts and scales",
    "block attention",
    "block MLP",
    "timestep embedding",
    "label embedding",
]
AWAKE = [set(GROUPS[:1]), set(GROUPS[:4]), set(GROUPS)]  # expected after step 1, 2, 3

Inputs = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


def random_inputs(model: DiT, key: jax.Array) -> Inputs:
    """x `[B, H, W, C]` normal, t `[B]` in 0 .. 999, and a condition of all the classes and null."""
    x_key, t_key, y_key = jax.random.split(key, 3)
    side = model.input_size
    x = jax.random.normal(x_key, (BATCH, side, side, model.in_channels))
    t = jax.random.uniform(t_key, (BATCH,), maxval=999.0)
    condition = {"y": jax.random.randint(y_key, (BATCH,), 0, model.num_classes + 1)}
    if model.mask_classes:
        shape, high = (BATCH, side, side), model.mask_classes + 1
        condition["mask"] = jax.random.randint(y_key, shape, 0, high)
    if model.augment_size:
        condition["augment"] = jax.random.normal(y_key, (BATCH, model.augment_size))
    return x, t, condition


# The identity


@jax.jit
def deviations(model: DiT, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest |block(x, c) - x| of each block, and the largest |model(x, t, y)|.

    First for c = condition(t, y), `[L]`, then for random c that varies in space, `[L]`.
    """
    inputs_key, x_key, c_key = jax.random.split(key, 3)
    image, t, condition = random_inputs(model, inputs_key)
    tokens = (model.input_size // model.patch_size) ** 2
    shape = (BATCH, tokens, model.hidden_size)  # [B, T, D]
    x = jax.random.normal(x_key, shape)
    spatial = jax.random.normal(c_key, shape)

    def largest(c: jax.Array) -> jax.Array:
        def of_block(block: object) -> jax.Array:
            return jnp.abs(block(x, c) - x).max().astype(jnp.float32)

        return jax.lax.map(of_block, model.blocks)

    uniform = model.condition(t, **condition)
    output = model(image, t, **condition)
    return largest(uniform), largest(spatial), jnp.abs(output).max()


# The waking


def group_of(path: tuple, column: str = "") -> str:
    """The line of the report that a parameter belongs to; `column` is its part of a modulation."""
    top, inner = path[0].name, path[1].name
    if top == "final":
        return "final linear layer" if inner == "linear" else f"final {inner}"
    if top == "blocks":
        names = {"gate": "gates", "shift": "shifts and scales", "scale": "shifts and scales"}
        names |= {"mlp": "MLP", "cross_attention": "cross-attention"}
        return f"block {names.get(column or inner, inner)}"
    names = {"patch_embed": "patch", "timestep_embed": "timestep"}
    return f"{names.get(top, 'label')} embedding"  # a mask's and an augmentation's wake with it


def reached(grads: DiT) -> dict[str, jax.Array]:
    """Whether each tensor of a group, in a stack each layer's, has a gradient: bool `[tensors]`."""
    flags: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        is_stack = path[0].name == "blocks"
        layers = leaf if is_stack else leaf[None]  # [layers, ...]
        pieces = {"": layers}
        if is_stack and path[1].name == "modulation":
            pieces = columns_of(layers, grads.blocks.modulation.num_vectors)
        for column, piece in pieces.items():
            values = piece.reshape(len(piece), -1)
            flags.setdefault(group_of(path, column), []).append(jnp.any(values != 0, axis=1))
    return {group: jnp.concatenate(parts) for group, parts in flags.items()}


def columns_of(modulation: jax.Array, num_vectors: int) -> dict[str, jax.Array]:
    """A modulation's kernel or bias `[L, ..., 6 D]`, both branches', by shift, scale and gate."""
    names = ["shift", "scale", "gate"][: num_vectors // 2]  # of 6 or, without gates, 4
    first, second = jnp.split(modulation, 2, axis=-1)
    both = jnp.stack([first, second], axis=1)  # [L, 2, ..., 3 D]
    return dict(zip(names, jnp.split(both, len(names), axis=-1), strict=True))


def waking(config: Config, key: jax.Array) -> list[dict[str, bool | None]]:
    """What the loss's gradient reaches at each of the first three steps of plain gradient descent.

    True is all of a group, False nothing, None a part.
    """
    objective = make_objective(config)
    model = jax.jit(lambda: make_model(config, key))()

    @functools.partial(jax.jit, donate_argnums=0)
    def descend(model: DiT, key: jax.Array) -> tuple[DiT, dict[str, jax.Array]]:
        x, _, condition = random_inputs(model, key)
        x = jnp.tanh(x)
        grads = jax.grad(lambda model: objective.loss(model, key, x, condition)[0])(model)
        model = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, model, grads)
        return model, reached(grads)

    history = []
    for step in range(len(AWAKE)):
        model, groups = descend(model, jax.random.fold_in(key, step))
        history.append({name: all_or_part(flags) for name, flags in groups.items()})
    return history


def all_or_part(flags: jax.Array) -> bool | None:
    if flags.all():
        return True
    return None if flags.any() else False


# The report


def report(config: Config) -> list[str]:
    """Prints the two tables and returns what is wrong, nothing where the property holds."""
    return report_identity(config) + report_waking(config)


def report_identity(config: Config) -> list[str]:
    seed, columns = config.train.seed, {}
    for dtype in ("float32", "bfloat16"):
        typed = replace(config, train=dict(dtype=dtype))
        model = jax.jit(functools.partial(make_model, typed))(jax.random.key(seed))
        uniform, spatial, output = deviations(model, jax.random.key(seed + 1))
        columns[dtype] = [*uniform.tolist(), float(output)]
        columns[f"{dtype}, c in space"] = [*spatial.tolist(), float(output)]
        del model  # before the next one is made

    model = config.model
    print(f"{config.name}: the largest |block(x, c) - x| at initialisation, ", end="")
    print(f"conditioning {model.conditioning}\n")
    print(" " * 8 + "".join(f"{name:>22}" for name in columns))
    names = [f"block {i}" for i in range(model.depth)] + ["|model|"]
    faults = []
    for name, *values in zip(names, *columns.values(), strict=True):
        print(f"{name:>8}" + "".join(f"{value:>22.3g}" for value in values))
        for column, value in zip(columns, values, strict=True):
            if value != 0:
                faults.append(f"{name} moves by {value:.3g} in {column}")
    return faults


def report_waking(config: Config) -> list[str]:
    history = waking(config, jax.random.key(config.train.seed))
    words = {True: "all", False: "-", None: "part"}
    print("\nwhat the gradient reaches\n")
    print(" " * 26 + "".join(f"{f'step {n + 1}':>9}" for n in range(len(history))))
    faults = []
    for group in [*GROUPS, *sorted(history[0].keys() - set(GROUPS))]:
        row = [step.get(group, False) for step in history]
        print(f"{group:>26}" + "".join(f"{words[value]:>9}" for value in row))
        for n, value in enumerate(row):
            expected = group in AWAKE[n]
            if value is not expected:
                should = "should" if expected else "should not"
                faults.append(f"{group} {should} receive a gradient at step {n + 1}")
    return faults


def run(config: Config) -> int:
    """Prints the report and a conclusion; returns the exit status."""
    faults = report(config)
    if not faults:
        depth = config.model.depth
        print(f"\nevery one of the {depth} blocks is the identity, bit for bit, ", end="")
        print("and wakes as it should")
        return 0
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    print(f"\nNOT the identity: {faults[0]}{more}")
    return 1


if __name__ == "__main__":
    with cli.exit_status("dit.identity"):
        sys.exit(run(CONFIG))
