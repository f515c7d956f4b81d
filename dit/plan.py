"""What a run will cost, before the machine is rented: python -m dit.plan PRESET [--topology v5e:16x16] [--section.field value ...]

Prints parameters, multiply-adds, and bytes of state a device. With a TPU topology it compiles the very train step for chips that are not
there (needs the `plan` extra, libtpu) and prints what the compiler says of its memory. Exit status 0 if it fits, 1 if it does not.
"""

import math
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the chips are described, not used
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from jax.experimental import topologies

from dit import config as dit_config
from dit.config import Config, InputError, one_line
from dit.model import count_parameters, multiply_adds
from dit.sharding import make_mesh
from dit.state import State, abstract_state

GIB = 1 << 30
MEMORY = {"v2": 8, "v3": 16, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB of HBM a chip (v2, v3: a core)


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology such as `v5e:16x16`. Raises InputError."""
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu").devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(f"--topology: {name!r} should be a TPU topology, such as v5e:2x4, v5e:16x16 or v5p:2x2x4, and libtpu be "
                         f"installed ({one_line(error)[:100]})") from error


def bytes_per_device(state: State) -> int:
    """Of the largest share that any device holds of an abstract state."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state))


def plan(config: Config, topology: str | None) -> bool:
    """Prints the plan; False if the compiler says that it does not fit."""
    devices = topology_devices(topology) if topology else jax.devices()
    mesh = make_mesh(config.mesh, config.train.batch_size, config.optim.accumulate, devices)
    state = abstract_state(config, mesh)
    macs, chips = multiply_adds(state.model), len(devices)
    print(f"{config.name}: {count_parameters(state.model):,} parameters, {macs / 1e9:.2f} G multiply-adds an image, "
          f"{6 * macs * config.train.batch_size / 1e12:.4g} TFLOP a step")
    print(f"{chips} {topology or devices[0].device_kind} device(s), data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}, "
          f"{config.train.batch_size // chips} images a device, {bytes_per_device(state) / GIB:.2f} GiB of state a device")
    if topology is None:
        return True
    from train import compile_train_step  # the step stands in train.py, for all to read

    limit = MEMORY.get(topology.split(":")[0])
    try:
        memory = compile_train_step(config, mesh).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        line = next((line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line), None)
        if line is None:
            raise
        print(f"does not fit: {line.strip()}")
        return False
    arguments = memory.argument_size_in_bytes
    total = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    print(f"it compiles: {arguments / GIB:.2f} GiB of arguments + {memory.temp_size_in_bytes / GIB:.2f} GiB of temporaries = "
          f"{total / GIB:.2f}" + (f" of {limit}" if limit else "") + " GiB a device")
    return True


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    topology = None
    with dit_config.input_errors("dit.plan"):
        if "--topology" in argv:
            at = argv.index("--topology")
            if at + 1 == len(argv):
                raise InputError("--topology: missing a value; it should be a TPU topology, such as v5e:16x16")
            topology, argv = argv[at + 1], argv[:at] + argv[at + 2:]
        config = dit_config.from_command_line(argv, "python -m dit.plan", __doc__).validate()
        fits = plan(config, topology)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
