"""What a command says while it works: lines, and how far it is."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import IO

import jax
import numpy as np
from tqdm import tqdm


def say(text: str) -> None:
    """Prints a line on process 0, above a progress bar if there is one."""
    if jax.process_index() == 0:
        tqdm.write(text)
        sys.stdout.flush()


class Progress:
    """A bar on a terminal, and elsewhere a line at most every five seconds. Process 0 only."""

    def __init__(self, total: int, unit: str, done: int = 0, file: IO[str] | None = None):
        self.total = total
        self.unit = unit
        self.first = done
        self.done = done
        self.file = file or sys.stderr
        self.started = time.monotonic()
        self.printed = -math.inf
        is_hidden = not sys.stderr.isatty() or jax.process_index() != 0
        self.bar = tqdm(
            total=total, initial=done, unit=f" {unit}", dynamic_ncols=True, disable=is_hidden
        )

    @property
    def rate(self) -> float:
        """Units a second, since the start."""
        return (self.done - self.first) / (time.monotonic() - self.started)

    @property
    def time_left(self) -> str:
        """Of the units that remain, as long as those before them took: [hours:]minutes:seconds."""
        seconds_each = (time.monotonic() - self.started) / (self.done - self.first)
        return tqdm.format_interval((self.total - self.done) * seconds_each)

    def advance(self, count: int, note: str | None = None) -> None:
        """Counts `count` more units; `note` stands behind the count in place of the rate."""
        self.done += count
        self.bar.update(count)
        if note is not None:
            self.bar.set_postfix_str(note, refresh=False)
        is_due = time.monotonic() - self.printed > 5 or self.done >= self.total
        if self.bar.disable and is_due and jax.process_index() == 0:
            words = f"{self.rate:,.1f} {self.unit}s/s" if note is None else note
            is_first = self.printed == -math.inf  # of which little can be said
            if self.done < self.total and not is_first:
                words += f"  {self.time_left} left"
            self.printed = time.monotonic()
            print(f"{self.unit} {self.done}/{self.total}  {words}", file=self.file, flush=True)

    def over(self, items: Iterable) -> Iterator:
        """The items, each counted as it goes by."""
        for item in items:
            self.advance(1)
            yield item

    def close(self) -> None:
        self.bar.close()


def with_progress(batches: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """Batches of images, each counted when the next is asked for."""
    progress = Progress(total, "image")
    for images in batches:
        yield images
        progress.advance(len(images))
    progress.close()
