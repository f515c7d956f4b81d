"""The devices of chips that are not here, for their compilers: h100:8, h200:2x8, v5e:2x4, cpu:8.

A slice of TPUs goes by its shape, GPUs by their number or by hosts x GPUs. The compilers, libtpu
and jax-cuda13-pjrt, come with the `plan` extra and need no chip.
"""

import contextlib
import logging
import re

import jax
from jax.experimental import topologies

from dit.chips import CHIPS
from dit.config import InputError, one_line, require

logging.getLogger("jax_plugins.xla_cuda13").setLevel(logging.ERROR)  # it misses a driver


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a topology. Raises InputError."""
    name, _, shape = topology.partition(":")
    plannable = [chip.name for chip in CHIPS if chip.memory] + ["cpu"]
    expected = f"one of {', '.join(plannable)}, and how many: h100:8, h200:2x8, v5e:2x4 or cpu:8"
    fits = name in plannable and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
    if not fits:
        raise InputError(f"--topology: {topology!r} should be {expected}")
    if name == "cpu":
        return cpu_devices(topology, shape)
    try:
        if name in GPUS:
            return gpu_devices(topology, GPUS[name])
        return list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"--topology: {topology!r} should be a slice that there is, and its compiler installed "
            f"by pip install -e '.[plan]' ({one_line(error)[:120]})"
        ) from error


def cpu_devices(topology: str, shape: str) -> list[jax.Device]:
    require(shape.isdigit(), "--topology", topology, "cpu: and a number")
    count = int(shape)
    with contextlib.suppress(RuntimeError):  # the CPUs are in use already, as many as there are
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    require(count <= len(devices), "--topology", topology, f"at most cpu:{len(devices)}")
    return devices[:count]


# XLA's description of each GPU, as far as they differ
GPUS = {
    "h100": dict(
        kind="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        lanes=128,
        clock=1.98,
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        cache=52_428_800,
        shared_memory=233_472,
    ),
}
GPUS["h200"] = GPUS["h100"] | dict(
    kind="NVIDIA H200", memory=151_397_597_184, bandwidth=4_800_000_000_000
)
GPUS["a100"] = GPUS["h100"] | dict(
    kind="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    cores=108,
    lanes=64,
    clock=1.41,
    memory=85_100_068_864,
    bandwidth=2_039_040_000_000,
    cache=41_943_040,
    shared_memory=167_936,
)


def gpu_devices(topology: str, gpu: dict) -> list[jax.Device]:
    """The devices of a number of GPUs, or of hosts x GPUs."""
    *hosts, gpus = [int(n) for n in topology.partition(":")[2].split("x")]
    if len(hosts) > 1:
        raise InputError(f"--topology: {topology!r} should be a number of GPUs, or hosts x GPUs")
    major, minor = gpu["capability"]
    target = f"""
        platform_name: "CUDA"
        device_description_str: "{gpu["kind"]}"
        dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
        gpu_device_info {{
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            core_count: {gpu["cores"]}
            fpus_per_core: {gpu["lanes"]}
            clock_rate_ghz: {gpu["clock"]}
            device_memory_size: {gpu["memory"]}
            memory_bandwidth: {gpu["bandwidth"]}
            l2_cache_size: {gpu["cache"]}
            shared_memory_per_core: {gpu["shared_memory"]}
            shared_memory_per_block: 49152
            shared_memory_per_block_optin: {gpu["shared_memory"] - 1024}
            registers_per_core_limit: 65536
            registers_per_block_limit: 65536
            threads_per_warp: 32
            threads_per_block_limit: 1024
            threads_per_core_limit: 2048
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65535
            block_dim_limit_z: 65535
        }}"""
    # jax asks the card's driver for cuDNN's version: this one stands in
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_cudnn_version = lambda: 91_200
    grid = f"1x{hosts[0] if hosts else 1}x{gpus}"  # partitions x hosts x GPUs
    described = topologies.get_topology_desc(platform="cuda", target_config=target, topology=grid)
    return list(described.devices)
