import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import inputs, tiny_config, tiny_model
from flax import nnx

from dit import identity, model as dit_model
from dit.identity import AWAKE, GROUPS, deviations, reached, report, waking
from dit.normalization import AdaLNZero


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_block_is_the_identity_bit_for_bit(dtype, seed):
    model = tiny_model(dtype, seed)
    x, c = (jax.random.normal(jax.random.key(seed + n), (3, 4, 20)).astype(dtype) for n in (5, 6))
    _, t, y = inputs(model, seed=seed)
    for i in range(model.depth):
        block = jax.tree.map(lambda leaf: leaf[i], model.blocks)
        for condition in (model.condition(t, y), c):  # [B, 1, D] and, varying in space, [B, T, D]
            np.testing.assert_array_equal(np.asarray(block(x, condition)).view(np.uint8), np.asarray(x).view(np.uint8))


@pytest.mark.parametrize("design", dit_model.BLOCKS)
def test_the_output_of_every_design_starts_at_zero(design):
    model = tiny_model(conditioning=design)
    assert not model(*inputs(model)).any()


def test_the_gradient_wakes_the_network_in_three_steps():
    history = waking(tiny_config(), jax.random.key(0))
    for step, expected in zip(history, AWAKE, strict=True):
        assert step == {group: group in expected for group in GROUPS}


def test_a_layer_that_is_not_reached_shows():
    grads = tiny_model()
    grads.blocks.mlp.up.kernel = nnx.Param(grads.blocks.mlp.up.kernel[...].at[1].set(0.0))
    assert reached(grads)["block MLP"].tolist().count(True) == 5  # two kernels of three layers, but one; and no bias


@pytest.mark.parametrize("design", ["adaln", "cross_attention", "in_context"])
def test_blocks_without_the_zero_are_caught(design):
    given, spatial, _ = deviations(tiny_model(conditioning=design), jax.random.key(0))
    assert (given > 0.1).all() and (spatial > 0.1).all()


def test_adaln_zero_whose_modulation_is_xavier_is_caught(monkeypatch, capsys):
    monkeypatch.setattr(dit_model, "AdaLNZero", functools.partial(AdaLNZero, kernel_init=nnx.initializers.xavier_uniform()))
    faults = report(tiny_config())
    assert any("block 0 moves by" in fault for fault in faults) and any("block 1 moves by" in fault for fault in faults)
    assert "should not receive a gradient at step 2" in " ".join(faults)


def test_one_wrong_bit_in_one_block_is_caught():
    model = tiny_model()
    bias = model.blocks.modulation.linear.bias[...]
    model.blocks.modulation.linear.bias = nnx.Param(bias.at[1, 5 * 20].set(1e-6))  # one channel of one gate of block 1
    given, _, output = deviations(model, jax.random.key(0))
    assert (np.asarray(given) > 0).tolist() == [False, True, False] and output == 0


def test_the_command_reports_and_answers_by_its_exit_status(capsys):
    tiny = ["--model.hidden-size", "20", "--model.depth", "2", "--model.num-heads", "5"]
    for preset, design, status, words in [("digits", "adaln_zero", 0, "every one of the 2 blocks is the identity"),
                                          ("digits_layout", "adaln_zero", 0, "every one of the 2 blocks is the identity"),
                                          ("digits", "adaln", 1, "NOT the identity: block 0")]:
        with pytest.raises(SystemExit) as stop:
            identity.main([preset, *tiny, "--model.conditioning", design])
        out = capsys.readouterr().out
        assert stop.value.code == status and words in out and "bfloat16, c in space" in out


def test_a_model_that_answers_is_caught():
    model = tiny_model()
    model.final.linear.bias = nnx.Param(jnp.full_like(model.final.linear.bias[...], 0.5))
    assert deviations(model, jax.random.key(0))[2] == 0.5


def test_imagenet_presets_can_be_built_without_their_data():
    from dit import config
    from dit.state import make_model

    for name, parameters in [("imagenet256_xl2", 674_834_720), ("imagenet256_b2", 130_315_808)]:
        preset = config.load(name).validate()
        assert dit_model.count_parameters(jax.eval_shape(lambda: make_model(preset, jax.random.key(0)))) == parameters
