"""The heap of C's malloc in a process that trains on a CPU, where the C library is glibc.

XLA asks it for memory in every matrix product, from all threads. Its defaults are for programs that
hold little.
"""

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # from malloc.h
HOLES = [base << k for k in range(26, 13, -1) for base in (3, 2)]  # bytes, from 192 MiB to 32 KiB
LARGE = 2**20  # bytes of a hole that is of use, and of which there are few
COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = 1.0  # seconds of a compilation that leaves holes; less, and the cache had the program


def glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        return None
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.sbrk.argtypes = [ctypes.c_ssize_t]
    library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
    return library


def keep_freed_memory() -> None:
    """Has the heap hold what a program frees for what it allocates next.

    Otherwise the temporaries of a step come from the kernel and go back to it every time, a quarter
    of the time of `cifar10_tiny`. A process holds up to twice as much memory. To be called before
    there is another thread: the first that allocates fixes how many heaps there may be.
    """
    if libc := glibc():
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never given back
        libc.mallopt(M_MMAP_MAX, 0)  # none mapped on its own
        libc.mallopt(M_ARENA_MAX, 1)  # one heap for all threads


def fill_holes() -> None:
    """Takes the small holes in the heap for good, so that what is allocated next lies elsewhere.

    A compiler leaves tens of thousands, up to 0.2 GB in all. glibc sorts and searches them while it
    holds the lock of its one heap, a quarter of the time of `digits` with patches of 2.
    """
    if libc := glibc():
        libc.malloc_trim(0)
        end = libc.sbrk(0)
        large = []  # taken first, that nothing small is cut from them, and given back
        for size in HOLES:
            hole = libc.malloc(size)
            while hole and hole + size <= end:
                if size >= LARGE:
                    large.append(hole)
                hole = libc.malloc(size)
            libc.free(hole)  # none was left of this size
        for hole in large:
            libc.free(hole)


def fill_holes_after_compiling() -> None:
    """From now on, whatever it is that is compiled for a CPU."""
    import jax

    jax.monitoring.register_event_duration_secs_listener(after_event)


def after_event(event: str, seconds: float, **_: Any) -> None:
    import jax

    if event == COMPILED and seconds > LONG and jax.default_backend() == "cpu":
        fill_holes()
