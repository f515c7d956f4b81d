"""The zero of adaLN-Zero, checked: python -m dit.identity PRESET_OR_FILE.py [--section.field value ...]

At initialisation every block is the identity, bit for bit, for any x, t, y, even where the condition varies in space, and the model's
output is zero. Then the gradient wakes the network in three steps: step 1 reaches the final linear layer alone (all behind it is
multiplied by its zero weights); step 2 also the final modulation, the patch embedding and the blocks' gates; step 3 everything.
Exit status 0 if all of that holds, 1 if not.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp

from dit import config as dit_config
from dit.config import Config
from dit.model import DiT
from dit.state import make_model, make_objective

BATCH = 2

# What the gradient reaches, in the order in which it wakes
GROUPS = ["final linear layer", "final modulation", "patch embedding", "block gates", "block shifts and scales", "block attention",
          "block MLP", "timestep embedding", "label embedding"]
AWAKE = [set(GROUPS[:1]), set(GROUPS[:4]), set(GROUPS)]  # expected after step 1, 2, 3


def random_inputs(model: DiT, key: jax.Array) -> tuple:
    """x `[B, H, W, C]` normal, t `[B]` in 0 .. 999, y `[B]` in all the classes and the null class, with masks where the model has them."""
    x_key, t_key, y_key = jax.random.split(key, 3)
    x = jax.random.normal(x_key, (BATCH, model.input_size, model.input_size, model.in_channels))
    y = jax.random.randint(y_key, (BATCH,), 0, model.num_classes + 1)
    masks = jax.random.randint(y_key, x.shape[:3], 0, model.mask_classes + 1)
    return x, jax.random.uniform(t_key, (BATCH,), maxval=999.0), (y, masks) if model.mask_classes else y


@jax.jit
def deviations(model: DiT, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest |block(x, c) - x| of each block `[L]`, for c = condition(t, y) and for random c in space, and of |model(x, t, y)|."""
    inputs_key, x_key, c_key = jax.random.split(key, 3)
    image, t, y = random_inputs(model, inputs_key)
    shape = (BATCH, (model.input_size // model.patch_size) ** 2, model.hidden_size)  # [B, T, D]
    x, spatial = (jax.random.normal(k, shape, model.dtype) for k in (x_key, c_key))

    def largest(c):
        return jax.lax.map(lambda block: jnp.abs(block(x, c) - x).max().astype(jnp.float32), model.blocks)

    return largest(model.condition(t, y)), largest(spatial), jnp.abs(model(image, t, y)).max()


def group_of(path: tuple, column: str = "") -> str:
    """The line of the report that a parameter belongs to."""
    top, inner = path[0].name, path[1].name
    if top == "blocks" and inner == "modulation":
        return "block gates" if column == "gate" else "block shifts and scales"
    return {"final": f"final {'linear layer' if inner == 'linear' else inner}", "patch_embed": "patch embedding",
            "timestep_embed": "timestep embedding", "label_embed": "label embedding", "mask_embed": "label embedding",
            "blocks": f"block {'MLP' if inner == 'mlp' else inner.replace('_', '-')}"}[top]


def reached(grads: DiT) -> dict[str, jax.Array]:
    """Of each group: does each of its tensors, in a stack each layer's, receive any gradient? Bool `[tensors]`."""
    found: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        stacked = path[0].name == "blocks"
        pieces = {"": leaf if stacked else leaf[None]}  # [layers, ...]
        if stacked and path[1].name == "modulation":
            names = ["shift", "scale", "gate"] * 2 if grads.conditioning == "adaln_zero" else ["shift", "scale"] * 2
            parts = jnp.split(leaf, len(names), axis=-1)
            pieces = {name: jnp.stack([p for n, p in zip(names, parts) if n == name], axis=1) for name in dict.fromkeys(names)}
        for column, piece in pieces.items():
            found.setdefault(group_of(path, column), []).append(jnp.any(piece != 0, axis=tuple(range(1, piece.ndim))))
    return {group: jnp.concatenate(flags) for group, flags in found.items()}


def waking(config: Config, key: jax.Array, steps: int = 3) -> list[dict[str, bool | None]]:
    """What the training loss's gradient reaches at each of the first steps of plain gradient descent; None is a part of a group."""
    objective, history = make_objective(config), []
    model = jax.jit(lambda: make_model(config, key))()

    @functools.partial(jax.jit, donate_argnums=0)
    def descend(model, key):
        x, _, y = random_inputs(model, key)
        grads = jax.grad(lambda m: objective.loss(m, key, jnp.tanh(x), y)[0])(model)
        return jax.tree.map(lambda p, g: p - 0.1 * g, model, grads), reached(grads)

    for step in range(steps):
        model, groups = descend(model, jax.random.fold_in(key, step))
        history.append({group: True if flags.all() else None if flags.any() else False for group, flags in jax.device_get(groups).items()})
    return history


def report(config: Config) -> list[str]:
    """Prints the two tables and returns what is wrong, in words; nothing, where the property holds."""
    faults, columns = [], {}
    for dtype in ("float32", "bfloat16"):
        model = jax.jit(lambda key: make_model(dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype)), key))(
            jax.random.key(config.train.seed))
        given, spatial, output = deviations(model, jax.random.key(config.train.seed + 1))
        columns |= {dtype: [*given.tolist(), float(output)], f"{dtype}, c in space": [*spatial.tolist(), float(output)]}
        del model
    print(f"{config.name}: the largest |block(x, c) - x| at initialisation, conditioning {config.model.conditioning}\n")
    print(f"{'':>8}" + "".join(f"{name:>22}" for name in columns))
    for i, values in enumerate(zip(*columns.values())):
        name = f"block {i}" if i < config.model.depth else "|model|"
        print(f"{name:>8}" + "".join(f"{value:>22.3g}" for value in values))
        faults += [f"{name} moves by {value:.3g} in {column}" for column, value in zip(columns, values) if value != 0]

    history = waking(config, jax.random.key(config.train.seed))
    print("\nwhat the gradient reaches\n\n" + f"{'':>26}" + "".join(f"{f'step {n + 1}':>9}" for n in range(len(history))))
    for group in [*GROUPS, *sorted(history[0].keys() - set(GROUPS))]:
        found = [step.get(group, False) for step in history]
        print(f"{group:>26}" + "".join(f"{ {True: 'all', False: '-', None: 'part'}[value]:>9}" for value in found))
        faults += [f"{group} {'should' if group in AWAKE[n] else 'should not'} receive a gradient at step {n + 1}"
                   for n, value in enumerate(found) if value is not (group in AWAKE[n])]
    return faults


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with dit_config.input_errors("dit.identity"):
        config = dit_config.from_command_line(argv, "python -m dit.identity", __doc__).validate()
    faults = report(config)
    print("\n" + (f"NOT the identity: {faults[0]}" + f" (and {len(faults) - 1} more)" * (len(faults) > 1) if faults else
                  f"every one of the {config.model.depth} blocks is the identity, bit for bit, and wakes as it should"))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
