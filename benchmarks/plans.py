"""The table of plans of benchmarks/README.md: python benchmarks/plans.py

What makes each size of DiT fit on chips that are not here, and the bounds of its speed. More than
an hour on two cores.
"""

import itertools

import plan
from dit import cli
from dit.config import PRESETS, replace

SIZES = {
    "S/2": PRESETS["DiT-S/2"],
    "B/2": PRESETS["DiT-B/2"],
    "XL/2": PRESETS["DiT-XL/2"],
    "3B": dict(patch_size=2, hidden_size=2304, depth=32, num_heads=18),
    "7B": dict(patch_size=2, hidden_size=3072, depth=40, num_heads=24),
}
TOPOLOGIES = ["h100:1", "h100:8", "h100:8x8", "v5e:2x4", "v5e:16x16", "v5p:2x2x4"]


def print_table() -> None:
    """Markdown: what makes each size fit on each topology, and the bounds of its speed."""
    recipe = cli.load_preset("imagenet256_xl2")
    print("| chips | DiT | it fits with | GiB | products, memory, links (ms) | images/s | MFU |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for topology, (name, size) in itertools.product(TOPOLOGIES, SIZES.items()):
        config = replace(recipe, model=size, mesh=dict(fsdp=1))
        *_, last = plan.attempts(config, plan.devices_of(topology))
        print(f"| {topology} | {name} | {table_row(last)} |", flush=True)


def table_row(attempt: plan.Attempt) -> str:
    if not attempt.fits:
        return f"nothing | {attempt.bytes / plan.GIB:.1f} | | |"
    found = attempt.found
    milliseconds = ", ".join(f"{1e3 * seconds:.1f}" for seconds in found.seconds.values())
    images_per_second, mfu = plan.rates(found, max(found.seconds.values()))
    return (
        f"{attempt.flags or 'nothing more'} | {found.total / plan.GIB:.1f} | {milliseconds} | "
        f"{images_per_second:,.0f} | {mfu:.0%}"
    )


if __name__ == "__main__":
    print_table()
