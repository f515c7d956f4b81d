"""What chips can do, from the vendors' data sheets, and what is asked of their compilers."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One chip. `memory` is what a program may use of it: JAX takes 75 % of an NVIDIA card's."""

    name: str  # in --topology
    kinds: tuple[str, ...]  # parts of JAX's device_kind, one of which is its
    peak: float  # FLOP/s of dense products in bfloat16
    memory: float = 0  # bytes
    bandwidth: float = 0  # bytes/s of its memory
    links: float = 0  # bytes/s to the chips of its host, or of its slice, in one direction
    network: float = 0  # bytes/s to other hosts, in one direction


CHIPS = [
    Chip("h200", ("H200",), 989e12, 0.75 * 151_397_597_184, 4.8e12, 450e9, 50e9),
    Chip("h100", ("H100",), 989e12, 0.75 * 84_942_979_072, 3.352e12, 450e9, 50e9),
    Chip("a100", ("A100",), 312e12, 0.75 * 85_100_068_864, 2.039e12, 300e9, 25e9),
    Chip("l40s", ("L40S",), 362e12),
    Chip("v4", ("TPU v4",), 275e12),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 0.819e12, 200e9),
    Chip("v5p", ("TPU v5",), 459e12, 95 * GIB, 2.765e12, 600e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1.64e12, 448e9),
]


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a JAX device, if it is known."""
    return next((chip for chip in CHIPS if any(kind in device_kind for kind in chip.kinds)), None)


# What is asked of XLA's compiler beside its defaults, by platform. O1 runs each gather of a block's
# weights and each sum of its gradients under the products of another block, rather than between
# them. A TPU's compiler does so by itself.
O1 = 19  # in the numbers of jax_optimization_level
COMPILER_OPTIONS = {"gpu": {"optimization_level": O1}}
