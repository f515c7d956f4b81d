"""What the device can do: python benchmarks/machine.py [--size 8192] [--dtype float32]

Prints the rate of a large square product of matrices and the bandwidth of the memory: the two
bounds of a training step.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from dit import cli
from dit.config import PositiveInt


@dataclass(frozen=True)
class Options:
    size: PositiveInt = 8192  # side of the matrices; the array read and written has 8 times theirs
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the matrices
    repeats: PositiveInt = 50  # of each operation


def seconds_each(f: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int) -> float:
    """How long f takes, fed its own output."""
    f = jax.jit(f, donate_argnums=0)
    x = jax.block_until_ready(f(x))  # compiles
    start = time.perf_counter()
    for _ in range(repeats):
        x = f(x)
    jax.block_until_ready(x)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/machine.py", __doc__)
    size, repeats = options.size, options.repeats
    key = jax.random.key(0)
    # of this scale a product has the scale of its factor
    matrix = jax.random.normal(key, (size, size), options.dtype) * size**-0.5
    flops = 2 * size**3 / seconds_each(lambda x: x @ matrix, matrix + 0, repeats)
    array = jnp.zeros((8, size, size), jnp.float32)
    num_bytes = 2 * array.nbytes  # read and written
    bandwidth = num_bytes / seconds_each(lambda x: x + 1, array, repeats)
    print(
        f"{jax.devices()[0].device_kind}: {flops / 1e12:.3g} TFLOP/s of {options.dtype} products "
        f"of {size:,} x {size:,}, {bandwidth / 1e12:.3g} TB/s read and written"
    )


if __name__ == "__main__":
    with cli.exit_status("benchmarks/machine.py"):
        main()
