"""What a run will cost, before the machine is rented: python plan.py PRESET [--topology v5e:16x16]

Prints parameters, multiply-adds, and bytes of state a device. With a TPU topology it compiles the
train step for chips that are not there (needs the `plan` extra, libtpu) and prints what the
compiler says of its memory. Exit status 0 if it fits, 1 if it does not.
"""

import math
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from dit import cli
from dit.config import Config, InputError, one_line


@dataclass(frozen=True)
class Plan:
    config: Annotated[Config, tyro.conf.arg(name="")]
    topology: str | None = None  # TPU topology, such as v5e:2x4, v5e:16x16 or v5p:2x2x4


def parse(argv: list[str]) -> Plan:
    """The options of `PRESET_OR_FILE.py [--topology NAME] [--section.field value ...]`."""
    plan = cli.parse_preset(Plan, argv, "plan.py", __doc__, Plan)
    plan.config.validate()
    return plan


# The chips are described, not used. To be set before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

if __name__ == "__main__":  # --help and bad input are answered before jax is imported
    with cli.exit_status("plan.py"):
        PLAN = parse(sys.argv[1:])

import jax
from jax.experimental import topologies

from dit.model import count_parameters, multiply_adds
from dit.sharding import make_mesh
from dit.state import State, abstract_state
from train import compile_train_step

GIB = 1 << 30
MEMORY = {"v2": 8, "v3": 16, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB (v2, v3: a core)


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology. Raises InputError."""
    try:
        topology = topologies.get_topology_desc(topology_name=name, platform="tpu")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"--topology: {name!r} should be a TPU topology, such as v5e:2x4, v5e:16x16 or "
            f"v5p:2x2x4, and libtpu be installed ({one_line(error)[:100]})"
        ) from error
    return list(topology.devices)


def bytes_per_device(state: State) -> int:
    """Of the largest share that any device holds of an abstract state."""
    shares = [
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(state)
    ]
    return sum(shares)


def run(plan: Plan) -> int:
    """Prints the plan. Returns 1 if the compiler says that it does not fit, else 0."""
    config, topology = plan.config, plan.topology
    devices = topology_devices(topology) if topology else jax.devices()
    mesh = make_mesh(config, devices)
    state = abstract_state(config, mesh)
    print_counts(config, state, topology or devices[0].device_kind, mesh)
    if topology is None:
        return 0
    try:
        memory = compile_train_step(config, mesh).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        reasons = [line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line]
        if not reasons:
            raise
        print(f"does not fit: {reasons[0].strip()}")
        return 1
    print_memory(memory, MEMORY.get(topology.split(":")[0]))
    return 0


def print_counts(config: Config, state: State, kind: str, mesh: jax.sharding.Mesh) -> None:
    operations, batch_size = multiply_adds(state.model), config.train.batch_size
    tflop = 6 * operations * batch_size / 1e12
    devices, axes = mesh.devices.size, f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}"
    print(
        f"{config.name}: {count_parameters(state.model):,} parameters, "
        f"{operations / 1e9:.2f} G multiply-adds an image, {tflop:.4g} TFLOP a step"
    )
    print(
        f"{devices} {kind} device(s), {axes}, {batch_size // devices} images a device, "
        f"{bytes_per_device(state) / GIB:.2f} GiB of state a device"
    )


def print_memory(memory: Any, limit: int | None) -> None:
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + outputs + temporaries
    of_limit = f" of {limit}" if limit else ""
    print(
        f"it compiles: {arguments / GIB:.2f} GiB of arguments + {temporaries / GIB:.2f} GiB of "
        f"temporaries = {total / GIB:.2f}{of_limit} GiB a device"
    )


if __name__ == "__main__":
    with cli.exit_status("plan.py"):
        sys.exit(run(PLAN))
