import importlib.util

import pytest

from dit import plan


def test_plan_counts_parameters_cost_and_bytes_without_any_chip(capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main(["imagenet256_xl2", "--mesh.fsdp", "8"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "674,834,720 parameters" in out and "118.62 G multiply-adds" in out and "182.2 TFLOP a step" in out
    share = float(out.split(" GiB of state a device")[0].split()[-1])
    assert share == pytest.approx(4 * 4 * 674_834_720 / 8 / 2**30, rel=0.01), "parameters, average and two moments over eight devices"


def test_plan_refuses_what_is_no_topology(refused):
    assert "--topology: 'v9e:2x4' should be a TPU topology" in refused(plan.main, "imagenet256_xl2", "--topology", "v9e:2x4")
    assert "--topology: missing a value" in refused(plan.main, "imagenet256_xl2", "--topology")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu (the `plan` extra)")
def test_plan_compiles_for_chips_that_are_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main(["cifar10_tiny", "--topology", "v5e:2x4", "--mesh.fsdp", "2"])
    assert stop.value.code == 0 and "data 4 x fsdp 2" in capsys.readouterr().out
