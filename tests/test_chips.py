"""What is known of a chip."""

import pytest

from dit.chips import CHIPS, find_chip
from dit.topology import GPUS


@pytest.mark.parametrize(
    "device_kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
    ],
)
def test_a_chip_is_found_by_the_kind_of_its_devices(device_kind, name):
    assert find_chip(device_kind).name == name


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v3", "Tesla V100-SXM2-16GB", ""])
def test_of_other_devices_nothing_is_known(device_kind):
    assert find_chip(device_kind) is None


def test_a_chip_that_can_be_planned_for_has_every_number():
    for chip in CHIPS:
        if chip.memory:
            assert min(chip.peak, chip.bandwidth, chip.links) > 0, chip.name
    assert {chip.name for chip in CHIPS if chip.network} == GPUS.keys()


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_as_it_is_described_to_xla_is_the_chip_of_its_name(name):
    gpu = GPUS[name]
    chip = find_chip(gpu["kind"])
    assert chip.name == name
    assert chip.memory == 0.75 * gpu["memory"]
    assert chip.bandwidth == pytest.approx(gpu["bandwidth"], rel=1e-3)
