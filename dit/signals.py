"""What Ctrl-C, SIGTERM and SIGHUP do to a command. It is imported first: it needs little itself."""

import os
import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Notes the first Ctrl-C, SIGTERM or SIGHUP, so that a run saves and stops. A second kills it.

    As a context it listens, and restores what was before at its end.
    """

    def __init__(self):
        self.requested = False
        self.entered = False
        self.before: dict[int, Any] = {}

    def end_at_once(self, prog: str) -> "StopRequest":
        """Listens, and until it is entered ends the command in one line, also while XLA compiles.

        In a thread: the main one is told of a signal only between two lines of Python.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)

        def wait() -> None:
            (number,) = os.read(read, 1)
            if not self.entered:
                os.write(2, f"{prog}: interrupted\n".encode())  # sys.stderr may be redirected
                os._exit(128 + number)

        threading.Thread(target=wait, daemon=True).start()
        return self.listen()

    def listen(self) -> "StopRequest":
        """From now on; again where a library has taken the signals."""
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if not self.requested and handler is not signal.SIG_IGN:  # as nohup has it
                self.before.setdefault(number, handler)
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True
        for number in self.before:
            signal.signal(number, signal.SIG_DFL)

    def __enter__(self) -> "StopRequest":
        self.entered = True
        return self.listen()

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
