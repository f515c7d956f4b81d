"""Several hosts in small: real processes with CPU devices, which find each other as Slurm's do.

tests/on_hosts.py is what most of them run; the curve of one device is what they are held against.
"""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, run_sample, run_train
from on_hosts import config_of, stand_in_for_inception, write_reference
from processes import finish, start_hosts
from test_latents import encode_photographs, open_encoded

import train
from dit import checkpoint, intact
from dit.sharding import make_mesh
from dit.state import abstract_state

pytestmark = pytest.mark.slow


def run_on_hosts(name: str, count: int, devices: int, folder: Path) -> list[dict]:
    """What each host found."""
    command = ["tests/on_hosts.py", name, devices, folder]
    for status, out, err in finish(start_hosts([command] * count, devices)):
        assert status == 0, out + err
    return [json.loads((folder / f"host-{rank}.json").read_text()) for rank in range(count)]


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(workdir) if "loss" in row}


def train_here(devices: int, config) -> train.State:
    """Trains on so many devices of this process."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = jax.devices()[:devices]
        patch.setattr("dit.run.make_mesh", lambda config: make_mesh(config, chosen))
        return train.train(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def one(folder) -> dict[int, float]:
    """The losses of one device, with the scores of every step."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_inception(patch)
        reference = write_reference(folder / "reference.npz")
        train_here(1, config_of(folder / "one", 7, eval=dict(every=1, reference=reference)))
    return losses(folder / "one")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    return run_on_hosts("two", 2, 4, folder)


@pytest.fixture(scope="module")
def four(folder, two) -> list[dict]:
    return run_on_hosts("four", 4, 2, folder)


# One run


def close_to(values: dict[int, float]) -> dict:
    return {step: pytest.approx(value, abs=1e-6) for step, value in values.items()}


def test_the_losses_are_those_of_one_device_whatever_the_hosts_and_through_a_resume(
    folder, one, two, four
):
    """Two hosts of 4 devices make three steps, four hosts of one the next, of 2 the one after."""
    assert sorted(one) == [1, 2, 3, 4, 5, 6, 7]
    assert losses(folder / "run") == close_to({step: one[step] for step in (1, 2, 3)})
    assert losses(folder / "two by two") == close_to({step: one[step] for step in (1, 2)})
    stopped = four[0]["stopped"]
    assert 3 < stopped < 7
    mean = np.mean([one[step] for step in range(4, stopped + 2)])  # the stop writes no line
    assert losses(folder / "four by two")[stopped + 1] == pytest.approx(mean, abs=1e-6)


def test_one_process_of_8_devices_goes_on_from_what_four_hosts_saved(folder, one, four, tmp_path):
    workdir, stopped = tmp_path / "run", four[0]["stopped"]
    shutil.copytree(folder / "longer", workdir)
    train_here(8, config_of(workdir, stopped + 1, fsdp=8))
    mean = np.mean([one[step] for step in range(4, stopped + 2)])
    assert losses(workdir)[stopped + 1] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("devices, fsdp", [(1, 1), (2, 2), (4, 1), (4, 4), (8, 8)])
def test_a_checkpoint_of_8_devices_is_restored_on_fewer_bit_for_bit(folder, two, devices, fsdp):
    config = config_of(folder / "run", 3, fsdp)
    target = abstract_state(config, make_mesh(config, jax.devices()[:devices]))
    restored = jax.tree.leaves(checkpoint.restore(folder / "run", 3, target))
    with np.load(folder / "run.npz") as saved:
        for array, expected in zip(restored, saved.values(), strict=True):
            np.testing.assert_array_equal(array, expected)
    shared = {leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in restored}
    assert shared == ({True, False} if fsdp > 1 else {False}), "some parameters are spread"


def test_a_checkpoint_of_8_devices_is_restored_on_four_hosts_bit_for_bit(four):
    assert [found["restored"] for found in four] == [True] * 4


def test_two_and_four_hosts_measure_what_one_does(folder, one, two, four):
    ours = {row["step"]: row for row in rows(folder / "one") if "fid" in row}
    for theirs in rows(folder / "run")[-1], rows(folder / "four by two")[-1]:
        for name in ("fid", "inception_score"):
            assert ours[theirs["step"]][name] == pytest.approx(theirs[name], rel=1e-3)


# Stopping


def test_all_hosts_stop_within_two_steps_of_a_ctrl_c_on_one(four):
    """Which comes at step 5, far from a line of the log."""
    steps = {found["stopped"] for found in four}
    assert len(steps) == 1
    assert steps <= {5, 6, 7}


def test_a_sigterm_to_one_command_stops_both_and_only_the_first_prints(tmp_path):
    """The command itself, and its losses, which are those of one process."""
    options = "--train.steps 1000000 --mesh.fsdp 2 --mesh.distributed True".split()
    command = ["train.py", *TINY, "--workdir", tmp_path / "two", *options]
    first, second = processes = start_hosts([command] * 2)
    for line in first.stdout:
        if line.startswith("step "):
            break
    second.terminate()
    answers = finish(processes)
    assert [status for status, _, _ in answers] == [0, 0], answers
    step, _ = intact.newest(tmp_path / "two")
    assert f"stopped at step {step}; the same command goes on from here" in answers[0][1]
    assert "step" not in answers[1][1]
    assert "parameters" not in answers[1][1]
    run_train(*TINY, "--workdir", tmp_path / "one", "--train.steps", "2")
    for ours, theirs in zip(rows(tmp_path / "one"), rows(tmp_path / "two")[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


def test_a_host_that_is_not_yet_training_ends_at_sigterm():
    program = "import os, signal; from dit.hosts import *; connect_hosts(True, ''); "
    program += "os.kill(os.getpid(), signal.SIGTERM); signal.pause()"
    [(status, out, err)] = finish(start_hosts([["-c", program]]))
    assert status == -signal.SIGTERM, out + err


# Samples and latents


def test_two_and_four_hosts_share_the_samples_and_the_latents(folder, two, four, tmp_path):
    """They make what one makes, up to rounding."""
    flags = "--num-samples 19 --batch-size 8".split()
    run_sample(folder / "run", *flags, "--out", tmp_path / "samples.npz")
    encode_photographs(folder / "vae", tmp_path / "latents")
    images, labels = np.load(tmp_path / "samples.npz").values()
    records = open_encoded(tmp_path / "latents").records.read(range(64))
    for whose in ("of two", "of four"):
        their_images, their_labels = np.load(folder / f"samples {whose}.npz").values()
        assert np.abs(images.astype(int) - their_images).max() <= 1
        np.testing.assert_array_equal(labels, their_labels)

        source = open_encoded(folder / f"latents {whose}").records
        assert len(source) == 64
        theirs = source.read(range(64))
        np.testing.assert_allclose(records["latent"], theirs["latent"], rtol=2e-3, atol=1e-3)
        np.testing.assert_array_equal(records["label"], theirs["label"])
    assert not list(folder.glob("*.parts"))


# Refusals


REFUSALS = {  # of one of two hosts: which, and why
    "a missing data set": (1, "data.name: 'nowhere' should be `digits` or a TFDS data set"),
    "a run of another config": (1, "optim.beta1: 0.5, where 0.9 is stored"),
    "missing weights": (0, "stand-in: should be a file of weights, and there is none"),
    "samples of no checkpoint": (1, "should hold an intact checkpoint"),
    "samples in no style": (0, "--style: 'nowhere.png' should be a picture"),
    "latents of no VAE": (1, "nowhere/config.json: should be the config.json of a diffusers"),
    "latents of other options": (0, "was begun with size 32 rather than 40"),
    "a workdir that cannot be written": (1, "should be a folder that can be written"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_one_host_refuses_both_refuse_with_its_reason(two, case):
    host, words = REFUSALS[case]
    answers = [found["refusals"][case] for found in two]
    for status, line in answers:
        assert status == 2
        assert f": host {host}: " in line
        assert words in line
        assert len(line.splitlines()) == 1
    assert answers[0] == answers[1]
    assert two[0]["made"] == [], "nothing is half-written"


def test_folders_that_the_hosts_do_not_share_are_refused(two):
    for found in two:
        status, line = found["refusals"]["a workdir of its own"]
        assert status == 2
        words = "should be a folder that all hosts share: host 0 finds step 0 in it, host 1 step 3"
        assert words in line


def test_a_fault_of_one_host_keeps_its_traceback_and_ends_the_other(two):
    reason = "command: host 1: ZeroDivisionError: division by zero\n"
    assert [found["refusals"]["a fault"] for found in two] == [[2, reason], [1, "a traceback"]]


@pytest.mark.parametrize(
    "flags, words",
    [  # of host 1, of the data set that it opens and of its command line
        (
            ["--data.image-size", 16],
            "data.image_size and data.channels: (16, 1) should be (8, 1), those of 'digits'",
        ),
        (["--train.steps", 0], "train.steps: 0 should be more than 0"),
    ],
)
def test_a_command_that_one_host_refuses_ends_on_both_in_one_line(flags, words, tmp_path):
    def command(host: int, *flags) -> list:
        workdir = tmp_path / f"run-{host}"
        return ["train.py", *TINY, "--workdir", workdir, "--mesh.distributed", "True", *flags]

    answers = finish(start_hosts([command(0), command(1, *flags)]))
    for status, _, err in answers:
        assert (status, err) == (2, f"train.py: host 1: {words}\n")
    assert list(tmp_path.iterdir()) == []


FAILS = """
import sys
import time
import jax
import train
from dit import cli

def batches(*args):
    stream = whole(*args)
    yield from (next(stream) for _ in range(2))
    if jax.process_index() == 1:
        raise cli.InputError("the records are damaged")
    yield from stream

def first_state(config, *args):
    is_made = config.workdir / "made"
    if jax.process_index() == 1:
        while not is_made.exists():
            time.sleep(0.1)
        time.sleep(2)  # in which host 0 would be elsewhere, if it did not wait
        raise cli.InputError("a part is damaged")
    state = jax.block_until_ready(begun(config, *args))
    is_made.touch()
    return state

whole, begun = train.batches, train.first_state
setattr(train, sys.argv[1], globals()[sys.argv[1]])
with cli.exit_status("train.py"):
    train.train(cli.parse_config(sys.argv[2:], "train.py", ""))
"""


@pytest.mark.parametrize(
    "where, reason",
    [("batches", "the records are damaged\n"), ("first_state", "a part is damaged\n")],
)
def test_what_one_host_refuses_while_the_other_waits_ends_both_with_its_reason(
    where, reason, tmp_path
):
    """Host 0 waits for host 1 in the third step's sums, or for its state."""
    command = ["-c", FAILS, where, *TINY, "--workdir", tmp_path, "--mesh.distributed", "True"]
    answers = finish(start_hosts([command] * 2))
    assert [status for status, _, _ in answers] == [2, 2], answers
    reasons = [err.partition(": ")[2] for _, _, err in answers]
    assert reasons == [f"host 1: {reason}", reason]
