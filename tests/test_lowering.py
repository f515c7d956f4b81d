"""Every preset lowers for an NVIDIA GPU, which needs no GPU and no compiler of its own."""

from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from dit import cli, model
from dit.config import Config, replace
from dit.model import BLOCKS
from dit.state import make_model, make_objective

PRESETS = sorted(path.stem for path in Path(__file__).parent.parent.glob("configs/*.py"))
BATCH = 2


@pytest.fixture
def cudnn(monkeypatch):
    """As if the devices were GPUs with a cuDNN."""
    monkeypatch.setattr(model, "has_cudnn_attention", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_200)


def lowered_for_cuda(config: Config) -> str:
    """The loss and its gradient, as StableHLO."""
    config.validate()
    network = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    H, W, C = config.input_shape
    condition = {"y": jax.ShapeDtypeStruct((BATCH,), jnp.int32)}
    if config.data.mask_classes:
        condition["mask"] = jax.ShapeDtypeStruct((BATCH, H, W), jnp.int32)
    x = jax.ShapeDtypeStruct((BATCH, H, W, C), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH))
    loss_and_grads = jax.value_and_grad(make_objective(config).loss, has_aux=True)
    traced = jax.jit(loss_and_grads).trace(network, keys, x, condition)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def custom_calls(text: str) -> Counter:
    """How often each of cuDNN's operations stands in a program."""
    names = ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward(")
    return Counter({name: text.count(f"@{name}") for name in names})


def cases(designs: bool) -> list[tuple[str, str]]:
    """Presets with their design, or with every design that they may have."""
    found = []
    for preset in PRESETS:
        config = cli.load_preset(preset)
        of_masks = ("adaln_zero", "adaln")
        possible = of_masks if config.data.mask_classes else BLOCKS
        found += [(preset, d) for d in (possible if designs else [config.model.conditioning])]
    return found


@pytest.mark.parametrize("preset, design", cases(designs=True))
def test_in_bfloat16_every_attention_is_cudnns(preset, design, cudnn):
    config = cli.load_preset(preset)
    config = replace(config, model=dict(conditioning=design), train=dict(dtype="bfloat16"))
    attentions = 2 if design == "cross_attention" else 1  # of a block, in the loop over them
    forward = 1 if config.model.remat == "none" else 2
    counts = custom_calls(lowered_for_cuda(config))
    assert list(counts.values()) == [forward * attentions, attentions]


@pytest.mark.parametrize("preset, design", cases(designs=False))
def test_in_float32_no_attention_is_cudnns(preset, design, cudnn):
    text = lowered_for_cuda(replace(cli.load_preset(preset), train=dict(dtype="float32")))
    assert "__cudnn" not in text
    assert "bf16" not in text


@pytest.mark.parametrize("design", BLOCKS)
def test_with_an_odd_number_of_tokens_no_attention_is_cudnns(design, cudnn):
    sizes = dict(conditioning=design, patch_size=4)  # 7 x 7 tokens, and 2 in context
    config = replace(cli.load_preset("cifar10"), model=sizes, data=dict(image_size=28))
    assert "__cudnn" not in lowered_for_cuda(config)


def test_with_heads_that_cudnn_does_not_know_none_is_cudnns(cudnn):
    sizes = dict(hidden_size=80, num_heads=4, depth=2)
    assert "__cudnn" not in lowered_for_cuda(replace(cli.load_preset("cifar10"), model=sizes))


def test_without_cudnn_every_preset_lowers_too():
    assert "__cudnn" not in lowered_for_cuda(cli.load_preset("cifar10"))
