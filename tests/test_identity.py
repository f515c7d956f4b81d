"""The zero of adaLN-Zero: the property, and that its check finds what breaks it."""

import runpy
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import block_of, inputs, tiny_config, tiny_model
from flax import nnx

from dit import cli, identity, normalization
from dit import model as dit_model
from dit.identity import AWAKE, GROUPS, deviations, reached, report, waking
from dit.signals import StopRequest
from dit.state import make_model

TINY = ["--model.hidden-size", "20", "--model.depth", "2", "--model.num-heads", "5"]


# The property


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_block_is_the_identity_bit_for_bit(dtype, seed):
    model = tiny_model(dtype, seed)
    x_key, c_key = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(x_key, (3, 4, 20))
    spatial = jax.random.normal(c_key, (3, 4, 20))
    _, t, y = inputs(model, seed=seed)
    for i in range(model.depth):
        for c in (model.condition(t, y), spatial):
            np.testing.assert_array_equal(bits(block_of(model, i)(x, c)), bits(x))


@pytest.mark.parametrize("design", dit_model.BLOCKS)
def test_the_output_of_every_design_starts_at_zero(design):
    model = tiny_model(conditioning=design)
    assert not model(*inputs(model)).any()


def test_the_gradient_wakes_the_network_in_three_steps():
    history = waking(tiny_config(), jax.random.key(0))
    for groups, expected in zip(history, AWAKE, strict=True):
        assert groups == {group: group in expected for group in GROUPS}


# The check


def test_a_layer_that_the_gradient_does_not_reach_shows():
    grads = tiny_model()
    kernel = grads.blocks.mlp.up.kernel[...]
    grads.blocks.mlp.up.kernel = nnx.Param(kernel.at[1].set(0.0))
    flags = reached(grads)["block MLP"].tolist()
    assert flags.count(True) == 5, "two kernels of three layers, less one; biases start at 0"


@pytest.mark.parametrize("design", ["adaln", "cross_attention", "in_context"])
def test_blocks_without_the_zero_are_caught(design):
    uniform, spatial, _ = deviations(tiny_model(conditioning=design), jax.random.key(0))
    assert (uniform > 0.1).all()
    assert (spatial > 0.1).all()


@pytest.mark.slow
def test_a_modulation_that_starts_from_xavier_is_caught(monkeypatch, capsys):
    monkeypatch.setattr(dit_model, "zero_init", normalization.xavier)
    faults = report(tiny_config())
    assert any("block 0 moves by" in fault for fault in faults)
    assert any("block 1 moves by" in fault for fault in faults)
    assert any("should not receive a gradient at step 2" in fault for fault in faults)


def test_one_wrong_bit_in_one_block_is_caught():
    model = tiny_model()
    bias = model.blocks.modulation.linear.bias[...]
    one_channel_of_a_gate = (1, 5 * 20)  # of block 1
    model.blocks.modulation.linear.bias = nnx.Param(bias.at[one_channel_of_a_gate].set(1e-6))
    uniform, _, output = deviations(model, jax.random.key(0))
    assert (np.asarray(uniform) > 0).tolist() == [False, True, False]
    assert output == 0


def test_an_output_that_does_not_start_at_zero_is_caught():
    model = tiny_model()
    model.final.linear.bias = nnx.Param(jnp.full_like(model.final.linear.bias[...], 0.5))
    _, _, output = deviations(model, jax.random.key(0))
    assert output == 0.5


# The command


@pytest.mark.parametrize(
    "preset, design, status, conclusion",
    [
        ("digits", "adaln_zero", 0, "every one of the 2 blocks is the identity"),
        ("digits_layout", "adaln_zero", 0, "every one of the 2 blocks is the identity"),
        ("digits --data.augment 0.5", "adaln_zero", 0, "every one of the 2 blocks is the identity"),
        ("digits", "adaln", 1, "NOT the identity: block 0 moves by"),
    ],
)
def test_the_command_answers_by_its_exit_status(
    preset, design, status, conclusion, capsys, monkeypatch
):
    argv = ["identity.py", *preset.split(), *TINY, "--model.conditioning", design]
    monkeypatch.setattr(sys, "argv", argv)
    # it would end this process at the next signal, which other tests send
    monkeypatch.setattr(StopRequest, "end_at_once", lambda self, prog: self)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(identity.__file__, run_name="__main__")
    output = capsys.readouterr().out
    assert stop.value.code == status
    assert conclusion in output
    assert "bfloat16, c in space" in output


@pytest.mark.parametrize(
    "preset, parameters", [("imagenet256_xl2", 674_834_720), ("imagenet256_b2", 130_315_808)]
)
def test_imagenet_presets_can_be_built_without_their_data(preset, parameters):
    config = cli.load_preset(preset).validate()
    model = jax.eval_shape(partial(make_model, config), jax.random.key(0))
    assert dit_model.count_parameters(model) == parameters
