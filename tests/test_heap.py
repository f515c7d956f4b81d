"""The C heap: what is freed is kept, and what a compiler leaves is not searched again."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dit import heap

pytestmark = pytest.mark.skipif(heap.glibc() is None, reason="of glibc")


ROOT = Path(__file__).resolve().parent.parent


def run_program(program: str, *words: str) -> str:
    command = [sys.executable, "-c", program, *words]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    return answer.stdout


def test_freed_memory_is_kept_for_what_is_allocated_next():
    program = """
import resource, sys
from dit import heap
if sys.argv[1] == "kept":
    heap.keep_freed_memory()
import numpy as np
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)  # 64 MiB, 16,384 pages or 32 huge ones
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
    assert int(run_program(program, "kept")) == 0
    assert int(run_program(program, "as ever")) > 0


def test_all_threads_of_a_run_share_one_heap():
    program = """
import runpy, sys, threading
sys.argv = ["train.py", "nowhere"]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit:
    from dit import heap
libc = heap.glibc()
found = []
for _ in range(3):
    thread = threading.Thread(target=lambda: found.append(libc.malloc(2**27)))
    thread.start()
    thread.join()
print(max(found) < libc.sbrk(0))  # another heap, or a mapping of its own, lies above
"""
    assert run_program(program) == "True\n"


def test_filled_holes_are_not_allocated_again():
    program = """
import sys
from dit import heap
heap.keep_freed_memory()
libc = heap.glibc()
sizes = [2**15 + 4099 * (i % 53) for i in range(1009)]
blocks = [(libc.malloc(size), libc.malloc(4099)) for size in sizes]  # the latter are walls
end = max(wall for _, wall in blocks)
for block, _ in blocks:
    libc.free(block)
if sys.argv[1] == "filled":
    heap.fill_holes()
print(sum(libc.malloc(size) < end for size in sizes[:499]))
"""
    assert int(run_program(program, "filled")) == 0
    assert int(run_program(program, "as ever")) == 499


def test_a_large_hole_is_left():
    program = """
from dit import heap
heap.keep_freed_memory()
libc = heap.glibc()
block, wall = libc.malloc(2**28), libc.malloc(2**15)
libc.free(block)
heap.fill_holes()
print(libc.malloc(2**28 - 2**20) < wall)
"""
    assert run_program(program) == "True\n"


def test_holes_are_filled_after_what_took_long_to_compile(monkeypatch):
    filled = []
    monkeypatch.setattr(heap, "fill_holes", lambda: filled.append(1))
    heap.fill_holes_after_compiling()
    try:
        for shortest, expected in [(1e9, 0), (0.0, 1)]:
            monkeypatch.setattr(heap, "LONG", shortest)
            x = jnp.ones(7)
            filled.clear()
            jax.jit(lambda x, n=expected: x + n)(x)
            assert len(filled) == expected
    finally:
        jax.monitoring.unregister_event_duration_listener(heap.after_event)
