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
from dit.linear import precision_of


@dataclass(frozen=True)
class Options:
    size: PositiveInt = 8192  # side of the matrices; the array read and written has 8 times theirs
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # type of the matrices
    repeats: PositiveInt = 50  # repeats of each operation


def seconds_each(f: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int) -> float:
    """How long f takes, fed its own output."""
    f = jax.jit(f, donate_argnums=0)
    x = jax.block_until_ready(f(x))  # compiles
    start = time.perf_counter()
    for _ in range(repeats):
        x = f(x)
    jax.block_until_ready(x)
    return (time.perf_counter() - start) / repeats


def product_rate(size: int, dtype: str, repeats: int) -> float:
    """FLOP/s of products of square matrices, as precise as their type."""
    # of this scale a product has the scale of its factor
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype) * size**-0.5

    def multiply(x: jax.Array) -> jax.Array:
        return jnp.matmul(x, matrix, precision=precision_of(dtype))

    return 2 * size**3 / seconds_each(multiply, matrix + 0, repeats)


def bandwidth(size: int, repeats: int) -> float:
    """Bytes/s read and written of an array of `size` numbers."""
    array = jnp.zeros(size, jnp.float32)
    return 2 * array.nbytes / seconds_each(lambda x: x + 1, array, repeats)


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/machine.py", __doc__)
    size, repeats = options.size, options.repeats
    flops = product_rate(size, options.dtype, repeats)
    bytes_per_second = bandwidth(8 * size**2, repeats)
    print(
        f"{jax.devices()[0].device_kind}: {flops / 1e12:.3g} TFLOP/s of {options.dtype} products "
        f"of {size:,} x {size:,}, {bytes_per_second / 1e12:.3g} TB/s read and written"
    )


if __name__ == "__main__":
    with cli.exit_status("benchmarks/machine.py"):
        main()
