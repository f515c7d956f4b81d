"""What each host of tests/test_hosts.py does: python tests/on_hosts.py HOSTS DEVICES FOLDER

Starting a process and importing jax takes seconds, so the hosts join once and then run one command
after the other, each on the first so many devices of every host. FOLDER is shared; what a host saw
is left in FOLDER/host-RANK.json.
"""

import contextlib
import io
import json
import shutil
import signal
import sys
from pathlib import Path

import conftest
import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from test_latents import encode_photographs

import sample
import train
from dit import cli
from dit.config import Config, replace
from dit.hosts import connect_hosts
from dit.imagenet import fid, latents
from dit.imagenet.inception import Features
from dit.sharding import make_mesh

POOL, SPATIAL, LOGITS = 13, 11, 7  # features of the stand-in for Inception


def config_of(workdir: Path, steps: int, fsdp: int = 1, **sections) -> Config:
    """A run on the digits, wide enough that FSDP shares its larger parameters."""
    config = conftest.tiny_config(
        model=dict(hidden_size=64, depth=1, num_heads=4),
        data=dict(flip=False),
        objective=dict(variance="fixed_small"),
        mesh=dict(fsdp=fsdp, distributed=jax.process_count() > 1),
        train=dict(workdir=str(workdir), steps=steps),
        eval=dict(inception="stand-in", num_samples=19, batch_size=8),
    )
    return replace(config, **sections)


def train_on(devices: int, config: Config) -> train.State:
    """Trains on the first so many devices of every host."""
    firsts = range(0, jax.device_count(), jax.local_device_count())
    chosen = [device for first in firsts for device in jax.devices()[first : first + devices]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit.run.make_mesh", lambda config: make_mesh(config, chosen))
        return train.train(config)


def signal_at(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends this process a signal while its run is at a step."""
    place_batch = train.place_batch
    placed = []

    def place(batch: dict, mesh: jax.sharding.Mesh) -> dict:
        placed.append(batch)
        if len(placed) == step:
            signal.raise_signal(number)
        return place_batch(batch, mesh)

    patch.setattr(train, "place_batch", place)


def stand_in_for_inception(patch: pytest.MonkeyPatch) -> None:
    """A few random products of the pixels in place of the network's features."""
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(64, n)).astype(np.float32) for n in (POOL, SPATIAL, LOGITS)]

    def features(matrices: list, images: jax.Array) -> Features:
        x = images.reshape(len(images), -1) / 127.5 - 1
        return Features(*(x @ matrix for matrix in matrices))

    patch.setattr(fid, "load_inception", lambda file: jax.tree_util.Partial(features, matrices))
    patch.setattr(fid, "POOL_FEATURES", POOL)
    patch.setattr(fid, "SPATIAL_FEATURES", SPATIAL)


def write_reference(path: Path) -> str:
    np.savez(path, mu=np.zeros(POOL), sigma=np.eye(POOL))
    return str(path)


def whole(state: train.State) -> list[np.ndarray]:
    """The arrays of a state that is spread over hosts."""
    return jax.tree.leaves(multihost_utils.process_allgather(state, tiled=True))


def save_arrays(path: Path, state: train.State) -> None:
    arrays = whole(state)
    if jax.process_index() == 0:
        np.savez(path, *arrays)


def answer(command, *args) -> list:
    """The exit status of a command in this process and what it printed on stderr."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), cli.exit_status("command"):
            command(*args)
        return [0, printed.getvalue()]
    except SystemExit as stop:
        return [stop.code, printed.getvalue()]
    except ZeroDivisionError:
        return [1, "a traceback"]


# What the hosts do


def two(folder: Path) -> dict:
    """Two hosts of 4 devices: runs on 4 and on 2, samples, latents; and what one host refuses."""
    run, rank = folder / "run", jax.process_index()
    state = train_and_evaluate(4, folder, run, 3)
    save_arrays(folder / "run.npz", state)
    train_on(2, config_of(folder / "two by two", 2, fsdp=2))
    if rank == 0:
        conftest.write_vae(folder / "vae")
    multihost_utils.sync_global_devices("the VAE is written")
    sample_and_encode(folder, run, "of two")
    answers = refusals(folder, run)
    made = sorted(path.name for path in folder.glob("new*"))
    return {"refusals": answers, "made": made}


def refusals(folder: Path, run: Path) -> dict:
    """What this host answers where one of both refuses."""
    rank, new = jax.process_index(), folder / "new"

    def of_train(host: int, name: str = "new", **sections) -> list:
        config = config_of(folder / name, 9)
        return answer(train.train, replace(config, **sections) if rank == host else config)

    def of_sample(host: int, **changes) -> list:
        options = dict(workdir=str(run), distributed=True, out=str(new) + ".npz")
        options |= changes if rank == host else {}
        return answer(lambda: sample.run(sample.Sample(**options)))

    def of_latents(host: int, *flags, out: Path = new) -> list:
        flags = flags if rank == host else []
        return answer(encode_photographs, folder / "vae", out, "--distributed", *flags)

    def fails(config) -> None:
        1 / 0  # noqa: B018

    (folder / "file").touch()
    of_run, of_file = dict(workdir=str(run)), dict(workdir=str(folder / "file/run"))
    answers = {
        "a missing data set": of_train(1, data=dict(name="nowhere")),
        "a run of another config": of_train(1, train=of_run, optim=dict(beta1=0.5)),
        "missing weights": of_train(0, eval=dict(every=1)),
        "a workdir of its own": of_train(1, train=of_run),
        "a workdir that cannot be written": of_train(1, "made by host 0", train=of_file),
        "samples of no checkpoint": of_sample(1, workdir=str(folder)),
        "samples in no style": of_sample(0, style="nowhere.png"),
        "latents of no VAE": of_latents(1, "--vae", "nowhere"),
        "latents of other options": of_latents(0, "--size", "40", out=folder / "latents of two"),
    }
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("dit.run.open_dataset", fails)
        answers["a fault"] = of_train(0)
    return answers


def train_and_evaluate(devices: int, folder: Path, workdir: Path, steps: int) -> train.State:
    """Trains with FSDP, with scores of every step."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_inception(patch)
        reference = write_reference(folder / f"reference-{jax.process_index()}.npz")
        scores = dict(every=1, reference=reference)
        return train_on(devices, config_of(workdir, steps, fsdp=4, eval=scores))


def sample_and_encode(folder: Path, run: Path, whose: str) -> None:
    """Samples of a run, and latents by the VAE in the folder."""
    out = str(folder / f"samples {whose}.npz")
    sample.run(sample.Sample(str(run), num_samples=19, batch_size=8, distributed=True, out=out))
    encode_photographs(folder / "vae", folder / f"latents {whose}", "--distributed")


def four(folder: Path) -> dict:
    """Four hosts go on with the run of two, until one of them gets a Ctrl-C, and then on 2 devices
    each for one step more. They sample the run of two as it was, and encode.
    """
    run, rank = folder / "longer", jax.process_index()
    if rank == 0:
        shutil.copytree(folder / "run", run)
    multihost_utils.sync_global_devices("the run is copied")
    restored = whole(train_on(1, config_of(run, 3, fsdp=4)))
    with np.load(folder / "run.npz") as saved:
        pairs = zip(restored, saved.values(), strict=True)
        is_same = all(np.array_equal(a, b) for a, b in pairs)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 3:
            signal_at(patch, 2, signal.SIGINT)  # the second step of this process, the run's fifth
        rare = dict(log_every=15)  # a stop does not wait for a line of the log
        state = train_on(1, config_of(run, 15, fsdp=4, train=rare))
    stopped = int(state.step)
    if rank == 0:
        shutil.copytree(run, folder / "four by two")
    multihost_utils.sync_global_devices("the run is copied again")
    train_and_evaluate(2, folder, folder / "four by two", stopped + 1)
    sample_and_encode(folder, folder / "run", "of four")
    return {"restored": is_same, "stopped": stopped}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    connect_hosts(True, "tests")
    for command in (train, sample, latents):
        command.connect_hosts = lambda distributed, name: None  # they have
    found = {"two": two, "four": four}[sys.argv[1]](Path(sys.argv[3]))
    path = Path(sys.argv[3]) / f"host-{jax.process_index()}.json"
    path.write_text(json.dumps(found))
