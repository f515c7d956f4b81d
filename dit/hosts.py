"""Several hosts that act as one: they join, refuse bad input together, and stop together.

jax is imported where it is used, since sample.py answers bad input without it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from dit.config import InputError, one_line

if TYPE_CHECKING:
    import jax

MAX_REASON = 4096  # bytes of a refusal's line that the other hosts see


def connect_hosts(distributed: bool, name: str) -> None:
    """Joins the other hosts, where there are any. `name` is the option, for the InputError."""
    if not distributed:
        return
    import jax

    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: True should be set on hosts that find each other: Cloud TPU, Slurm, "
            f"Open MPI, Kubernetes ({one_line(error)})"
        ) from error
    # JAX now swallows SIGTERM, which would otherwise end a host that is not yet training
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def gather_texts(text: str) -> list[str]:
    """The text of every host, in order; each host waits for all."""
    from jax.experimental import multihost_utils

    row = np.zeros(MAX_REASON, np.uint8)
    encoded = np.frombuffer(text.encode()[:MAX_REASON], np.uint8)
    row[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(row)  # [hosts, MAX_REASON]
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


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
    except InputError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        fault = error
    reasons = gather_texts(reason)
    if fault is not None:
        raise fault  # with its traceback, on this host
    for host, reason in enumerate(reasons):
        if reason:
            raise InputError(f"host {host}: {reason}")


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
