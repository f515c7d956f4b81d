"""Several hosts that act as one: they join, refuse bad input together, and end together.

jax is imported where it is used, since the commands answer bad input without it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit.config import Diverged, InputError, Stopped, one_line

if TYPE_CHECKING:
    import jax

MAX_REASON = 4096  # bytes of a refusal's line that the other hosts see
REASONS = "why_a_host_ended/"  # what the coordinator keeps them under
BEATS = "beats/"  # and under which each host counts the seconds
SILENCE = 10.0  # seconds without a beat after which a host is said to be missing
AFTERWARDS = "where one is gone, all end within minutes, and the same command goes on"


def connect_hosts(distributed: bool, name: str) -> None:
    """Joins the other hosts, where there are any. `name` is the option, for the InputError."""
    if not distributed:
        return
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # else it takes SIGTERM from us
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: True should be set on hosts that find each other: Cloud TPU, Slurm, "
            f"Open MPI, Kubernetes ({one_line(error)})"
        ) from error


def gather_texts(text: str) -> list[str]:
    """The text of every host, in order; each host waits for all."""
    from jax.experimental import multihost_utils

    row = np.zeros(MAX_REASON, np.uint8)
    encoded = np.frombuffer(text.encode()[:MAX_REASON], np.uint8)
    row[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(row)  # [hosts, MAX_REASON]
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def reason_of(error: Exception) -> str:
    """One line for the other hosts."""
    return (
        str(error)
        if isinstance(error, InputError)
        else f"{type(error).__name__}: {one_line(error)}"
    )


@contextlib.contextmanager
def refused_together(distributed: bool) -> Iterator[None]:
    """Raises what one host raises in the block on all of them, at the block's end.

    Nothing in the block may wait for the other hosts. After it, all of them have succeeded.
    """
    if not distributed:
        yield
        return
    reason = ""
    fault = None
    try:
        yield
    except Exception as error:
        reason = reason_of(error)
        fault = None if isinstance(error, InputError) else error
    reasons = gather_texts(reason)
    if fault is not None:
        raise fault  # with its traceback, on this host
    for host, reason in enumerate(reasons):
        if reason:
            raise InputError(f"host {host}: {reason}")


@contextlib.contextmanager
def command_refused_together(distributed: bool) -> Iterator[None]:
    """Has the other hosts refuse what this one does, before it has joined them, in the block.

    They wait for it to join, and then in the first `refused_together` of their own.
    """
    try:
        yield
    except InputError:
        if not distributed:
            raise
        connect_hosts(True, "distributed")
        with refused_together(True):
            raise


@contextlib.contextmanager
def ended_together(distributed: bool, where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Ends all hosts where one fails in the block, in which they may wait for each other.

    At its end they wait too. The one that fails leaves its reason with the coordinator. The others
    look there every second, say it and exit with status 2: a host that waits for another in a
    program cannot be told. Where one is lost the others say so, and `where` that was, such as
    ", at step 3"; JAX ends them later.
    """
    if not distributed:
        yield
        return
    import jax
    from jax._src.distributed import global_state  # as Orbax does it
    from jax.experimental import multihost_utils

    coordinator = global_state.client
    left = threading.Event()

    def watch() -> None:
        heard, missing = {}, set()
        while not left.wait(1.0):
            try:
                reasons = coordinator.key_value_dir_get(REASONS)
                silent = silent_hosts(coordinator, heard)
            except jax.errors.JaxRuntimeError:
                reasons, silent = [], {"0"}  # whose process is the coordinator
            for key, reason in reasons:
                warn(f"{key.removeprefix(REASONS)}: {reason}")
                jax.distributed.shutdown()  # in which the one that fails waits for the others
                os._exit(2)
            for host in silent - missing:
                warn(f"{host} has not been heard of for {SILENCE:.0f} s{where()}; {AFTERWARDS}")
            missing = silent

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        multihost_utils.sync_global_devices("ended_together")
    except (Diverged, Stopped):  # as they all have
        raise
    except Exception as error:
        left.set()
        if isinstance(error, jax.errors.JaxRuntimeError):  # a host may be gone
            warn(f"{jax.process_index()}: {one_line(error)[:120]}{where()}; {AFTERWARDS}")
        coordinator.key_value_set(f"{REASONS}{jax.process_index()}", reason_of(error))
        raise
    finally:
        left.set()
        watcher.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            coordinator.key_value_delete(f"{BEATS}{jax.process_index()}")


def warn(line: str) -> None:
    print(f"{Path(sys.argv[0]).name}: host {line}", file=sys.stderr, flush=True)


def silent_hosts(coordinator: Any, heard: dict[str, tuple[str, float]]) -> set[str]:
    """The hosts whose beats have stopped. Beats for this one.

    `heard` keeps the last beat of each, and when it was seen.
    """
    import jax

    now = time.monotonic()
    coordinator.key_value_set(f"{BEATS}{jax.process_index()}", str(now), allow_overwrite=True)
    beats = {key.removeprefix(BEATS): beat for key, beat in coordinator.key_value_dir_get(BEATS)}
    for host, beat in beats.items():
        if host not in heard or heard[host][0] != beat:
            heard[host] = (beat, now)
    return {host for host in beats if now - heard[host][1] > SILENCE}


def require_same(distributed: bool, name: str, value: str, found: str) -> None:
    """Raises InputError on all hosts where they do not all find the same in a folder."""
    everywhere = gather_texts(found) if distributed else [found]
    for host, other in enumerate(everywhere):
        if other != everywhere[0]:
            raise InputError(
                f"{name}: {value!r} should be a folder that all hosts share: host 0 finds "
                f"{everywhere[0]} in it, host {host} {other}"
            )


class AnyHost:
    """Whether a flag is set on any host. All hosts ask at every step, and get the same answer.

    It is a step old, so that nobody waits for it: the devices have it when that step is done.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        import jax

        from dit.sharding import batch_sharding, replicated

        self.flags = {}
        for flag in (False, True):
            rows = np.full(len(mesh.local_devices), flag, np.int32)
            flags = jax.make_array_from_process_local_data(batch_sharding(mesh), rows)
            self.flags[flag] = flags  # [devices], of which this host sets its own
        self.largest = jax.jit(lambda flags: flags.max(), out_shardings=replicated(mesh))
        self.pending: jax.Array | None = None

    def __call__(self, flag: bool) -> bool:
        import jax

        if jax.process_count() == 1:
            return flag
        earlier = self.pending
        self.pending = self.largest(self.flags[flag])
        return earlier is not None and bool(earlier)
