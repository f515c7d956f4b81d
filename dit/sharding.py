"""The mesh of devices, the rule that shards a tree over it, and the placement of batches.

Two axes: `data` shares the batch, `fsdp` shares the batch and the parameters. No model knows of either.
"""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dit import config as dit_config
from dit.config import InputError, one_line, require

SMALL = 2**14  # a tensor of fewer elements costs more to gather than to hold


def make_mesh(config: dit_config.Mesh, batch_size: int, accumulate: int = 1, devices=None) -> jax.sharding.Mesh:
    """The mesh over all devices. Raises InputError where devices or batch do not divide."""
    devices = jax.devices() if devices is None else devices
    data = len(devices) // config.fsdp if config.data == -1 else config.data
    require(data * config.fsdp == len(devices), "mesh.data and mesh.fsdp", (config.data, config.fsdp),
            f"such that their product is the number of devices, {len(devices)}")
    if batch_size % (len(devices) * accumulate):
        raise InputError(f"train.batch_size: {batch_size} should be a multiple of the {len(devices)} devices"
                         + f" times optim.accumulate = {accumulate}" * (accumulate > 1))
    return jax.make_mesh((data, config.fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def connect(distributed: bool, name: str) -> None:
    """Joins the other hosts, where there are any; `name` is the option that says so. Raises InputError."""
    if distributed:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise InputError(f"{name}: True should be set on hosts that find each other: Cloud TPU, Slurm, Open MPI, Kubernetes "
                             f"({one_line(error)})") from error


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree, mesh: jax.sharding.Mesh):
    """The rule: over `fsdp`, the largest axis that it divides, never the layer axis of a stack; small tensors whole."""
    fsdp = mesh.shape["fsdp"]

    def rule(path, leaf):
        stacked = "blocks" in jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        axes = [axis for axis in range(int(stacked), leaf.ndim) if leaf.shape[axis] % fsdp == 0]
        spec = [None] * leaf.ndim
        if fsdp > 1 and leaf.size >= SMALL and axes:
            spec[max(axes, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(rule, tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def place_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, spread over all devices."""
    return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), rows) for name, rows in batch.items()}


def split_parts(x, parts: int):
    """Leaves `[B, ...]` to `[parts, B / parts, ...]`: part i takes rows i, i + parts, ..., so each device has its share of every part."""
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), x)


def parts_of(rows: int, at_once: int) -> int:
    """The fewest equal parts of a number of rows that are at most `at_once` rows each, or one row."""
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= max(at_once, 1))


def map_parts(f, x: jax.Array, parts: int) -> jax.Array:
    """f over the rows of x `[B, ...]` in equal parts, one after the other, to save memory."""
    y = jax.lax.map(f, split_parts(x, parts))  # [parts, B / parts, ...]
    return y.swapaxes(0, 1).reshape(-1, *y.shape[2:])
