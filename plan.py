"""What a run will cost, before the machine is rented: python plan.py PRESET --topology h100:8

Compiles the train step for chips that are not there (needs the `plan` extra), and prints what each
device holds and sends, the bounds that this sets to the speed, and whether it fits. Topologies:
h100:8, a100:1, h200:2x8 (hosts x GPUs), v5e:2x4, v5e:16x16, v5p:2x2x4, cpu:8. Without one it prints
the counts alone. Exit status 0 if it fits, 1 if it does not.
"""

from dit.signals import StopRequest

if __name__ == "__main__":
    StopRequest().end_at_once("plan.py")

import itertools
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dit import cli
from dit.config import Config, replace


@dataclass(frozen=True)
class Plan:
    config: Annotated[Config, tyro.conf.arg(name="")]
    topology: str | None = None  # chips to compile for, such as h100:8 or v5e:2x4


# The chips are described, not used. To be set before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is locked
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # else libtpu asks for it on stderr

if __name__ == "__main__":  # --help and bad input are answered before jax is imported
    with cli.exit_status("plan.py"):
        PLAN = cli.parse_config(sys.argv[1:], "plan.py", __doc__, Plan)

import jax
import numpy as np
from flax import nnx

from dit.chips import GIB, Chip, find_chip
from dit.data import batch_shapes
from dit.imagenet.inception import Inception
from dit.imagenet.vae import GROUPS, LAYERS, VAE, load_vae
from dit.model import TRAINING_FLOPS, count_parameters, multiply_adds
from dit.program import Collective, collectives, temporaries
from dit.sharding import make_mesh
from dit.state import abstract_model, abstract_state
from dit.topology import devices_of
from train import compile_train_step

PUBLISHED_VAE = (128, 256, 512, 512)  # widths of Stable Diffusion's
STATE = ("parameters", "average", "optimizer")


# What a device holds, sends and computes


@dataclass(frozen=True)
class Estimate:
    """Of one training step, on one device unless it says otherwise."""

    config: Config
    mesh: jax.sharding.Mesh
    chip: Chip | None  # None for one of which nothing is known
    parameters: int  # of the model
    multiply_adds: int  # of an image's forward pass
    bytes: dict[str, float]  # by kind
    collectives: list[Collective]

    @property
    def total(self) -> float:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.chip is None or self.total <= self.chip.memory

    @property
    def flops(self) -> float:
        """That a step needs on all devices; what rematerialisation repeats is not in it."""
        return TRAINING_FLOPS * self.multiply_adds * self.config.train.batch_size

    @property
    def seconds(self) -> dict[str, float]:
        """What each resource needs for a step at its peak: no step is faster than any of them."""
        done = self.flops * (4 / 3 if self.config.model.remat == "full" else 1)
        state = sum(self.bytes[kind] for kind in STATE)
        touched = 2 * (state + self.bytes["temporaries"])  # written once and read once
        return {
            "products": done / self.mesh.devices.size / self.chip.peak,
            "memory": touched / self.chip.bandwidth,
            "links": sum(self.link_seconds(each) for each in self.collectives),
        }

    def link_seconds(self, collective: Collective) -> float:
        """Of what a device sends over its links, or of its part of what its host sends to others.

        A host of h in a group of n sends what one device would: the share (h - 1) / (n - 1) of
        what its devices send in all goes to others.
        """
        inside = collective.bytes / self.chip.links
        if not self.chip.network:  # a slice of TPUs
            return inside
        hosts = np.array([device.process_index for device in self.mesh.devices.flat])
        n = collective.groups.shape[1]
        h = max(len(set(hosts[group].tolist())) for group in collective.groups)
        return max(inside, collective.bytes * (h - 1) / (n - 1) / self.chip.network)


class TooLarge(Exception):
    """A compiler's refusal. `bytes` is what the program would need of a device."""

    def __init__(self, text: str):
        used = re.search(r"(?:Used |temporaries \()([\d.]+)([GM])", text)
        self.bytes = float(used[1]) * {"G": GIB, "M": 1 << 20}[used[2]] if used else math.inf


def estimate(config: Config, devices: list[jax.Device]) -> Estimate:
    """Compiles the step. Raises InputError and TooLarge."""
    mesh = make_mesh(config, devices)
    state = abstract_state(config, mesh)
    vae, inception = networks(config)
    try:
        step = compile_train_step(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLarge(str(error)) from error
        raise
    held = {
        "parameters": share(state.model),
        "average": share(state.emas),
        "optimizer": share(state.opt_state),
        "batch": sum(math.prod(s) * np.dtype(t).itemsize for s, t in batch_shapes(config).values())
        / len(devices),
    }
    memory = step.memory_analysis()
    held["padding"] = max(memory.argument_size_in_bytes - sum(held.values()), 0)
    held["temporaries"] = temporaries(step)
    held["VAE"] = share(vae)
    held["evaluation network"] = share(inception)
    return Estimate(
        config=config,
        mesh=mesh,
        chip=find_chip(devices[0].device_kind),
        parameters=count_parameters(state.model),
        multiply_adds=multiply_adds(state.model),
        bytes=held,
        collectives=collectives(step.as_text()),
    )


def share(tree: Any) -> int:
    """Bytes of a tree on the device that holds most; without shardings, all of them."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        if leaf.sharding
        else leaf.dtype.itemsize * leaf.size
        for leaf in jax.tree.leaves(tree)
    )


def networks(config: Config) -> tuple[Any, Any]:
    """The VAE and the Inception network that a run loads, None where it loads none.

    A folder that is not here yet counts as Stable Diffusion's VAE.
    """
    folder, vae, inception = config.data.vae, None, None
    if folder and Path(folder).exists():
        vae = load_vae(folder, config.data.latent_scale)
    elif folder:
        vae = jax.eval_shape(lambda: VAE(PUBLISHED_VAE, LAYERS, GROUPS, rngs=nnx.Rngs(0)))
    if config.eval.every:
        inception = jax.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))
    return vae, inception


# What could make it fit


def changes(config: Config, devices: int) -> Iterator[dict[str, dict]]:
    """Changes of a config that save memory, cheapest first: each is tried with as little of those
    before it as there can be.
    """
    remats = ("none", "dots", "full")
    remats = remats[remats.index(config.model.remat) :]
    meshes = [{}]
    if (config.mesh.data, config.mesh.fsdp) == (-1, 1) and devices > 1:
        meshes += [{"mesh": {"fsdp": fsdp}} for fsdp in sorted({min(devices, 8), devices})]
    for mesh, remat in itertools.product(meshes, remats):
        made = ({} if remat == config.model.remat else {"model": {"remat": remat}}) | mesh
        if made:
            yield made
    batch_size, accumulate = config.train.batch_size, 2 * config.optim.accumulate
    while batch_size % (accumulate * devices) == 0:
        yield made | {"optim": {"accumulate": accumulate}}
        accumulate *= 2
    while batch_size % (2 * devices) == 0:
        batch_size //= 2
        yield made | {"train": {"batch_size": batch_size}, "optim": {"accumulate": 1}}


@dataclass(frozen=True)
class Attempt:
    """A config with changes, and what came of it: an estimate, unless it is plainly too large."""

    changes: dict[str, dict]
    bytes: float
    found: Estimate | None

    @property
    def fits(self) -> bool:
        return self.found is not None and self.found.fits

    @property
    def flags(self) -> str:
        """The changes as a command line has them."""
        return " ".join(
            f"--{section}.{name.replace('_', '-')} {value}"
            for section, fields in self.changes.items()
            for name, value in fields.items()
        )


def attempts(config: Config, devices: list[jax.Device]) -> Iterator[Attempt]:
    """The config as it is, and then with `changes`, up to the first that fits."""
    for each in itertools.chain([{}], changes(config, len(devices))):
        attempt = attempt_with(each, config, devices)
        yield attempt
        if attempt.fits:
            return


def attempt_with(each: dict[str, dict], config: Config, devices: list[jax.Device]) -> Attempt:
    """Compiles the config with changes, unless its state alone is too large."""
    config, chip = replace(config, **each), find_chip(devices[0].device_kind)
    held = share(abstract_state(config, make_mesh(config, devices)))
    if each and chip and held > chip.memory:
        return Attempt(each, held, None)
    try:
        found = estimate(config, devices)
        return Attempt(each, found.total, found)
    except TooLarge as error:
        return Attempt(each, error.bytes, None)


# What is printed


def print_counts(config: Config, parameters: int, operations: int) -> None:
    tflop = TRAINING_FLOPS * operations * config.train.batch_size / 1e12
    print(
        f"{config.name}: {parameters:,} parameters, {operations / 1e9:.2f} G multiply-adds an "
        f"image, {tflop:.4g} TFLOP a step of {config.train.batch_size} images"
    )


def print_estimate(found: Estimate) -> None:
    mesh, config = found.mesh, found.config
    devices = mesh.devices.size
    print(
        f"{devices} x {mesh.devices.flat[0].device_kind}, data {mesh.shape['data']} x "
        f"fsdp {mesh.shape['fsdp']}, {config.train.batch_size // devices} images a device, "
        f"remat {config.model.remat}"
    )
    print("\na device holds               GiB")
    for kind, size in found.bytes.items():
        if size:
            print(f"  {kind:22} {size / GIB:8.3f}")
    limit = f" of {found.chip.memory / GIB:.2f}" if found.chip else ""
    print(f"  {'total':22} {found.total / GIB:8.3f}{limit}")
    print_collectives(found.collectives)
    if found.chip:
        print_bounds(found)


def print_collectives(found: list[Collective]) -> None:
    if not found:
        print("\na device sends nothing")
        return
    print("\na device sends a step        GB   operations")
    for kind in sorted({each.kind for each in found}):
        ours = [each for each in found if each.kind == kind]
        size, count = sum(each.bytes for each in ours), sum(each.times for each in ours)
        print(f"  {kind:20} {size / 1e9:10.4f} {count:8}")


def print_bounds(found: Estimate) -> None:
    print("\nno step is faster than       ms   images/s      MFU")
    for resource, seconds in found.seconds.items():
        if seconds:
            images_per_second, mfu = rates(found, seconds)
            print(f"  {resource:20} {1e3 * seconds:10.2f} {images_per_second:10,.0f} {mfu:8.0%}")
    print("These are bounds of the time, not predictions of it.\n")


def rates(found: Estimate, seconds: float) -> tuple[float, float]:
    """Images/s and the share of the peak, where a step takes so long."""
    peak = found.chip.peak * found.mesh.devices.size
    return found.config.train.batch_size / seconds, found.flops / seconds / peak


# The command


def run(plan: Plan) -> int:
    """Prints the plan. Returns 1 if it does not fit, else 0. Raises InputError."""
    config, topology = plan.config, plan.topology
    if topology is None:
        model = abstract_model(config)
        print_counts(config, count_parameters(model), multiply_adds(model))
        print("--topology says what devices hold and send, and whether it fits")
        return 0
    for attempt in attempts(config, devices_of(topology)):
        if attempt.found and not attempt.changes:
            print_counts(config, attempt.found.parameters, attempt.found.multiply_adds)
            print_estimate(attempt.found)
        answer = "it fits" if attempt.fits else "it does not fit"
        print(f"{attempt.flags or 'as it is'}: {answer}, {attempt.bytes / GIB:.2f} GiB")
    return 0 if attempt.fits and not attempt.changes else 1


if __name__ == "__main__":
    with cli.exit_status("plan.py"):
        sys.exit(run(PLAN))
