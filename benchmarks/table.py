"""The figures of the benchmarks as one table: python benchmarks/table.py FILE.jsonl ...

Each benchmark prints its rows so, and appends them to the file of its --json, one a line. A row
says what was measured (benchmark, case, unit), the median of the rounds (figure), the least and the
most, and where there is a peer its name, its median and the ratio of the two medians.
"""

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

from dit import cli
from dit.config import require

Row = dict[str, str | float]
COLUMNS = ("benchmark", "case", "unit", "figure", "least", "most", "peer", "peer_figure", "ratio")


def make_row(
    benchmark: str,
    case: str,
    unit: str,
    values: Sequence[float],
    peer: str | None = None,
    peer_values: Sequence[float] = (),
    device: str = "cpu",
) -> Row:
    """The row of the values of all rounds. Without values, what was tried does not fit."""
    software = f"Python {platform.python_version()}, jax {version('jax')}"
    row = dict(benchmark=benchmark, case=case, unit=unit)
    row["machine"] = f"{device}, {os.cpu_count()} CPU cores, {software}"
    row["figure"] = median(values)
    if values:
        row |= dict(least=min(values), most=max(values))
    if peer:
        row |= dict(peer=peer, peer_figure=median(peer_values))
    if values and peer_values and row["peer_figure"]:
        row["ratio"] = row["figure"] / row["peer_figure"]
    return row


def median(values: Sequence[float]) -> float | str:
    return statistics.median(values) if values else "does not fit"


def cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def report(rows: list[Row], path: str | None = None) -> None:
    """Prints rows as a table in Markdown, and appends them to a file of lines of JSON."""
    print("\n| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for row in rows:
        print("| " + " | ".join(cell(row.get(column, "")) for column in COLUMNS) + " |")
    print("\nOn " + "; ".join(sorted({row["machine"] for row in rows if "machine" in row})))
    if path:
        with Path(path).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@dataclass(frozen=True)
class Options:
    files: tyro.conf.Positional[tuple[str, ...]]  # files that benchmarks wrote by --json


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/table.py", __doc__)
    for name in options.files:
        require(Path(name).is_file(), "FILE", name, "a file that a benchmark wrote by --json")
    lines = [line for name in options.files for line in Path(name).read_text().splitlines()]
    report([json.loads(line) for line in lines])


if __name__ == "__main__":
    with cli.exit_status("benchmarks/table.py"):
        main()
