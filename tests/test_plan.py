"""What plan.py says of a run, with and without a compiler for its chips."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import tiny_config, write_vae

import plan
from dit import cli
from dit.chips import GIB, Chip
from dit.config import replace
from dit.imagenet.vae import load_vae
from dit.program import Collective

PARAMETERS = 674_834_720  # of DiT-XL/2
ROOT = Path(plan.__file__).parent

SMALL_RUN = ["digits", "--model.hidden-size", "32", "--model.depth", "2"]


def parse(*argv: str) -> plan.Plan:
    return cli.parse_config(list(argv), "plan.py", "", plan.Plan)


def run_plan(*argv: str) -> int:
    """What `python plan.py *argv` does; returns the exit status."""
    with cli.exit_status("plan.py"):
        return plan.run(parse(*argv))


# Without a compiler


def test_plan_counts_parameters_and_cost_without_any_chip(capsys):
    assert run_plan("imagenet256_xl2") == 0
    output = capsys.readouterr().out
    assert f"{PARAMETERS:,} parameters" in output
    assert "118.62 G multiply-adds" in output
    assert "182.2 TFLOP a step" in output
    assert "--topology says what devices hold and send" in output


def test_help_lists_the_topology_and_needs_no_jax(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "plan.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--topology" in done.stdout
    assert "--train.batch-size" in done.stdout


@pytest.mark.parametrize("topology", ["v9e:2x4", "h100", "h100:0", "h100:2x", "l40s:8", "cpu:0"])
def test_what_is_no_topology_is_refused(topology, refused):
    line = refused(run_plan, "digits", "--topology", topology)
    assert f"--topology: '{topology}' should be one of h200, h100, a100, " in line


def test_what_no_machine_has_is_refused(refused):
    line = refused(run_plan, "digits", "--topology", "h100:2x2x2")
    assert "--topology: 'h100:2x2x2' should be a number of GPUs, or hosts x GPUs" in line
    line = refused(run_plan, "digits", "--topology", "cpu:2x4")
    assert "--topology: 'cpu:2x4' should be cpu: and a number" in line
    line = refused(run_plan, "digits", "--topology", "cpu:9")
    assert "--topology: 'cpu:9' should be at most cpu:8" in line
    assert "--topology" in refused(run_plan, "digits", "--topology")


def test_devices_that_do_not_divide_are_refused(refused):
    line = refused(run_plan, "digits", "--topology", "cpu:8", "--train.batch-size", "12")
    assert "train.batch_size: 12 should be a multiple of the 8 devices" in line
    line = refused(run_plan, "digits", "--topology", "cpu:3", "--mesh.fsdp", "2")
    assert "mesh.data and mesh.fsdp: (-1, 2) should be such that their product is" in line
    assert "the number of devices, 3" in line


@pytest.mark.slow
def test_a_vae_that_is_here_is_counted(tmp_path):
    folder = write_vae(tmp_path / "vae")
    config = tiny_config(data=dict(latents="x", vae=str(folder), image_size=48))
    vae, inception = plan.networks(config)
    assert inception is None
    assert plan.share(vae) == sum(leaf.nbytes for leaf in jax.tree.leaves(load_vae(folder)))


@pytest.mark.slow
def test_every_average_is_counted():
    found = [
        plan.estimate(tiny_config(optim=dict(ema_decay=decay)), plan.devices_of("cpu:1")).bytes
        for decay in (0.9, (0.9, 0.99, 0.5))
    ]
    assert [sizes["average"] / sizes["parameters"] for sizes in found] == [1, 3]


# What could make a run fit


def test_the_cheapest_changes_come_first_and_smaller_batches_last():
    config = tiny_config(train=dict(batch_size=64))
    dots, full = {"model": {"remat": "dots"}}, {"model": {"remat": "full"}}
    fsdp = {"mesh": {"fsdp": 8}}
    parts = [full | fsdp | {"optim": {"accumulate": n}} for n in (2, 4, 8)]
    fewer = [
        full | fsdp | {"train": {"batch_size": n}, "optim": {"accumulate": 1}} for n in (32, 16, 8)
    ]
    expected = [dots, full, fsdp, dots | fsdp, full | fsdp, *parts, *fewer]
    assert list(plan.changes(config, 8)) == expected


def test_what_a_config_has_already_is_not_suggested():
    config = tiny_config(model=dict(remat="full"), mesh=dict(fsdp=2), optim=dict(accumulate=4))
    config = replace(config, train=dict(batch_size=16))
    assert list(plan.changes(config, 2)) == [
        {"optim": {"accumulate": 8}},
        *({"train": {"batch_size": n}, "optim": {"accumulate": 1}} for n in (8, 4, 2)),
    ]
    config = tiny_config(model=dict(remat="dots"), train=dict(batch_size=3))
    assert list(plan.changes(config, 1)) == [{"model": {"remat": "full"}}]


@pytest.mark.parametrize("devices, fsdp", [(2, [2]), (8, [8]), (256, [8, 256])])
def test_8_devices_share_the_parameters_and_all_only_where_that_is_not_enough(devices, fsdp):
    config = tiny_config(train=dict(batch_size=devices))
    meshes = [change["mesh"] for change in plan.changes(config, devices) if "mesh" in change]
    assert list(dict.fromkeys(mesh["fsdp"] for mesh in meshes)) == fsdp


def test_changes_are_shown_as_flags_that_make_them():
    changes = {"model": {"remat": "full"}, "train": {"batch_size": 8}}
    flags = plan.Attempt(changes, bytes=1, found=None).flags
    assert flags == "--model.remat full --train.batch-size 8"
    parsed = parse("digits", *flags.split())
    assert (parsed.config.model.remat, parsed.config.train.batch_size) == ("full", 8)
    assert plan.Attempt({}, bytes=1, found=None).flags == ""


def test_a_run_that_was_not_compiled_does_not_fit():
    assert not plan.Attempt({}, bytes=1, found=None).fits
    assert plan.Attempt({}, bytes=9, found=made_estimate(memory=9)).fits
    assert not plan.Attempt({}, bytes=9, found=made_estimate(memory=8.9)).fits


def test_the_compilers_refusal_says_what_it_would_need():
    refusal = "RESOURCE_EXHAUSTED: Ran out of memory. Used 17.50G of 15.75G hbm."
    assert plan.TooLarge(refusal).bytes == 17.5 * GIB
    assert plan.TooLarge("Used 512.00M of 1").bytes == GIB / 2
    refusal = "the total memory required for HLO temporaries (140.50G) exceeds available HBM (15G)"
    assert plan.TooLarge(refusal).bytes == 140.5 * GIB
    assert plan.TooLarge("RESOURCE_EXHAUSTED").bytes == float("inf")


# The bounds


def made_estimate(
    hosts=1, network=0.0, remat="none", memory=9.0, collectives=(), devices=8
) -> plan.Estimate:
    """On chips of 1000 FLOP/s, 100 bytes/s of memory and 10 bytes/s of links."""
    host_of = np.arange(devices) * hosts // devices
    flat = np.array([SimpleNamespace(process_index=int(host)) for host in host_of])
    return plan.Estimate(
        config=tiny_config(model=dict(remat=remat), train=dict(batch_size=16)),
        mesh=SimpleNamespace(devices=flat.reshape(1, devices)),
        chip=Chip("test", (), 1000, memory, 100, 10, network),
        parameters=7,
        multiply_adds=5,
        bytes={"parameters": 1, "average": 1, "optimizer": 2, "batch": 3, "temporaries": 2},
        collectives=list(collectives),
    )


ALL = np.arange(8)[None]


def exchange(size: int, groups=ALL, kind="all-gather", times=1) -> Collective:
    return Collective(kind, ("u8[1]",), size, np.asarray(groups), times)


def test_the_seconds_of_each_resource():
    sent = [exchange(80), exchange(80, kind="all-reduce", times=3)]
    found = made_estimate(collectives=sent)
    assert found.flops == 6 * 5 * 16
    assert found.total == 9
    assert found.seconds["products"] == pytest.approx(found.flops / 8 / 1000)
    assert found.seconds["memory"] == pytest.approx(2 * (1 + 1 + 2 + 2) / 100)
    assert found.seconds["links"] == pytest.approx((80 + 3 * 2 * 80) * 7 / 8 / 10)
    repeated = made_estimate(remat="full").seconds["products"]
    assert repeated == pytest.approx(4 / 3 * found.seconds["products"])
    assert made_estimate(remat="dots").seconds["products"] == found.seconds["products"]


def test_on_one_host_the_links_bound_what_is_sent():
    found = made_estimate(network=0.001)
    assert found.link_seconds(exchange(80)) == pytest.approx(70 / 10)


def test_between_hosts_the_network_bounds_what_is_sent_where_it_is_slower():
    one_host = [[0, 1, 2, 3], [4, 5, 6, 7]]
    pairs_across = [[0, 4], [1, 5], [2, 6], [3, 7]]
    slow, fast = made_estimate(hosts=2, network=0.5), made_estimate(hosts=2, network=1000)
    assert slow.link_seconds(exchange(80)) == pytest.approx(70 * (1 / 7) / 0.5)
    assert fast.link_seconds(exchange(80)) == pytest.approx(70 / 10)
    assert slow.link_seconds(exchange(80, one_host)) == pytest.approx(60 / 10)
    assert slow.link_seconds(exchange(80, pairs_across)) == pytest.approx(40 / 0.5)


def test_a_slice_of_tpus_has_no_network():
    found = made_estimate(hosts=2, network=0.0)
    assert found.link_seconds(exchange(80)) == pytest.approx(70 / 10)


# With a compiler


def test_a_run_on_cpus_is_planned_and_fits_what_has_no_limit(capsys):
    assert run_plan(*SMALL_RUN, "--topology", "cpu:8") == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split("  ")[1] for line in lines if line.startswith("  ")]
    assert {"parameters", "average", "optimizer", "batch", "temporaries", "total"} <= set(words)
    assert "all-reduce" in words
    assert "all-gather" not in words
    assert any(line.startswith("8 x cpu, data 8 x fsdp 1, 8 images a device") for line in lines)
    assert lines[-1].startswith("as it is: it fits, ")
    assert not any("MFU" in line for line in lines), "of a CPU no peak is known"


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_told_what_makes_it_fit(capsys, monkeypatch):
    argv = [*SMALL_RUN, "--topology", "cpu:1", "--train.sample-every", "0"]
    config = parse(*argv).config
    devices = plan.devices_of("cpu:1")
    sizes = {
        remat: plan.estimate(replace(config, model=dict(remat=remat)), devices).total
        for remat in ("none", "full")
    }
    assert sizes["full"] < sizes["none"]
    chip = Chip("small", ("cpu",), 1e12, (sizes["full"] + sizes["none"]) / 2, 1e11, 1e10)
    monkeypatch.setattr(plan, "find_chip", lambda kind: chip)
    assert run_plan(*argv, "--model.remat", "none") == 1
    output = capsys.readouterr().out
    assert f"{sizes['none'] / GIB:8.3f} of {chip.memory / GIB:.2f}" in output
    assert "as it is: it does not fit, " in output
    last = output.splitlines()[-1]
    assert last.startswith(("--model.remat dots: it fits", "--model.remat full: it fits"))
    assert "These are bounds of the time" in output


def test_what_cannot_hold_its_state_is_not_compiled(monkeypatch):
    config = tiny_config(model=dict(hidden_size=64, num_heads=4))  # wide enough to be shared
    devices = plan.devices_of("cpu:8")
    whole = plan.share(plan.abstract_state(config, plan.make_mesh(config, devices)))
    chip = Chip("small", ("cpu",), 1e12, whole - 1, 1e11, 1e10)
    monkeypatch.setattr(plan, "find_chip", lambda kind: chip)
    monkeypatch.setattr(plan, "estimate", None)
    attempt = plan.attempt_with({"model": {"remat": "dots"}}, config, devices)
    assert (attempt.bytes, attempt.found) == (whole, None)
    with pytest.raises(TypeError, match="not callable"):  # as it is, it is compiled nevertheless
        plan.attempt_with({}, config, devices)
    with pytest.raises(TypeError, match="not callable"):  # a share of it fits
        plan.attempt_with({"mesh": {"fsdp": 8}}, config, devices)


@pytest.mark.parity
@pytest.mark.parametrize(
    "argv",
    [
        "digits --topology h100:1",
        "cifar10 --topology h100:1",
        "imagenet256_xl2 --topology v5e:2x4 --data.vae vae",
    ],
)
def test_presets_compile_for_chips_that_are_not_here_and_fit(argv, capsys):
    assert run_plan(*argv.split()) == 0
    output = capsys.readouterr().out
    assert "as it is: it fits" in output
    assert ("VAE" in output) == ("vae" in argv)
    assert ("a device sends nothing" in output) == (":1" in argv)
