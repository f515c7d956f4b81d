"""The mesh of devices, the rule that shards a tree over it, and work in equal parts.

The mesh has two axes: `data` shares the batch, `fsdp` shares the batch and the parameters. A model
knows of neither: it only says where its weights are gathered.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dit.chips import COMPILER_OPTIONS
from dit.config import Config, require

SMALL = 2**14  # a tensor of fewer elements costs more to gather than to hold


# Devices


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over all devices. Raises InputError where devices or batch do not divide."""
    devices = jax.devices() if devices is None else devices
    fsdp, parts, batch_size = config.mesh.fsdp, config.optim.accumulate, config.train.batch_size
    data = len(devices) // fsdp if config.mesh.data == -1 else config.mesh.data
    require(
        data * fsdp == len(devices),
        "mesh.data and mesh.fsdp",
        (config.mesh.data, fsdp),
        f"such that their product is the number of devices, {len(devices)}",
    )
    multiple = f"a multiple of the {len(devices)} devices"
    if parts > 1:
        multiple += f" times optim.accumulate = {parts}"
    require(batch_size % (len(devices) * parts) == 0, "train.batch_size", batch_size, multiple)
    return _mesh(data, fsdp, devices)


def local_mesh() -> jax.sharding.Mesh:
    """The mesh over this host's own devices."""
    return _mesh(jax.local_device_count(), 1, jax.local_devices())


def _mesh(data: int, fsdp: int, devices: list[jax.Device]) -> jax.sharding.Mesh:
    axis_types = (AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axis_types, devices=devices)


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """What XLA's compiler is asked for on the devices of a mesh."""
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})


def platform() -> str:
    """Of the devices of the mesh in use, or without one the default's: cpu, gpu or tpu."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def has_cudnn_attention() -> bool:
    """Whether the devices run cuDNN's attention: GPUs from compute capability 8.0.

    A GPU that is not here is one of plan.py's, all newer.
    """
    here = jax.local_devices()[0]
    is_new = here.platform != "gpu" or float(here.compute_capability) >= 8
    return platform() == "gpu" and is_new


def is_one_cpu() -> bool:
    """Whether the mesh in use is a single CPU."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size == 1 and platform() == "cpu"


# Where arrays lie


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The rule: over `fsdp`, the largest axis that it divides, but never a stack's layer axis.

    Small tensors stay whole on every device.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(path: tuple, leaf: Any) -> NamedSharding:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        first_axis = 1 if "blocks" in names else 0
        axes = [axis for axis in range(first_axis, leaf.ndim) if leaf.shape[axis] % fsdp == 0]
        spec = [None] * leaf.ndim
        if fsdp > 1 and leaf.size >= SMALL and axes:
            spec[max(axes, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(rule, tree)


def gather(weights: jax.Array) -> jax.Array:
    """The weights whole on every device of the mesh in use; as they are where none is.

    So activations stay where the batch is. Left to itself the compiler carries the sharding of the
    weights on into them, and gathers the whole batch instead.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return weights if mesh.empty else jax.lax.with_sharding_constraint(weights, PartitionSpec())


def place_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, spread over all devices."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process has whole, as global arrays.

    Unlike `jax.device_put`, which compares them between the processes, it waits for none.
    """

    def place_leaf(leaf: np.ndarray | jax.Array) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place_leaf, tree)


def place_rows(tree: Any, rows: int, mesh: jax.sharding.Mesh) -> Any:
    """Arrays `[N, ...]` spread over the mesh, the last row repeated up to `rows` or a little more.

    The length is a multiple of the devices, and the same for every N up to `rows`: one compilation.
    """
    length = math.ceil(rows / mesh.devices.size) * mesh.devices.size

    def pad(array: np.ndarray) -> np.ndarray:
        return array[np.minimum(np.arange(length), len(array) - 1)]

    return place(jax.tree.map(pad, tree), batch_sharding(mesh))


# Work in equal parts, one after the other, to save memory


def num_parts(rows: int, at_once: int) -> int:
    """The fewest equal parts of `rows` that have at most `at_once` rows each, or one row."""
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= max(at_once, 1))


def split_parts(tree: Any, parts: int) -> Any:
    """Leaves `[B, ...]` to `[parts, B / parts, ...]`.

    Part i takes the rows i, i + parts, ..., so that each device has its share of every part.
    """
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), tree)


def map_parts(f: Callable[[jax.Array], jax.Array], x: jax.Array, parts: int) -> jax.Array:
    """f over the rows of x `[B, ...]`, a part at a time."""
    y = jax.lax.map(f, split_parts(x, parts))  # [parts, B / parts, ...]
    return y.swapaxes(0, 1).reshape(-1, *y.shape[2:])


def mean_over_parts(f: Callable[[Any, Any], Any], model: Any, batch: Any, parts: int) -> Any:
    """The mean of f(model, part) over the parts of a batch, whose leaves are `[B, ...]`.

    The devices along `data` add up what they have once, behind the last part; those along `fsdp`
    behind each part, since none has room for the sum of whole gradients.
    """
    if parts == 1:
        return f(model, batch)

    def mean(model: Any, batch: Any) -> Any:
        batch = split_parts(batch, parts)  # [parts, B / parts, ...]
        shapes = jax.eval_shape(f, model, jax.tree.map(lambda a: a[0], batch))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, f(model, part)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), batch)
        return jax.tree.map(lambda a: a / parts, total)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["data"] == 1:
        return mean(model, batch)

    def mean_over_data(model: Any, batch: Any) -> Any:
        return jax.lax.pmean(mean(model, batch), "data")

    whole, rows = PartitionSpec(), PartitionSpec("data")
    specs = dict(in_specs=(whole, rows), out_specs=whole)
    return jax.shard_map(mean_over_data, **specs, axis_names={"data"}, check_vma=False)(
        model, batch
    )
