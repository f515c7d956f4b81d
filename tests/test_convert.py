"""Weights in the authors' and in diffusers' layout, without PyTorch: in .safetensors files. test_parity_weights.py reads .pt files."""

import builtins
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import awaken, inputs, tiny_model, write_vae
from safetensors.numpy import load_file, save_file

import train
from dit import checkpoint, convert
from dit import config as dit_config
from dit.config import InputError
from dit.state import make_model
from dit.weights import load_inception, load_vae

SIZES = dict(hidden_size=52, num_heads=13, in_channels=4, input_size=6, patch_size=2, num_classes=11)


@pytest.fixture(scope="module")
def model():
    return awaken(tiny_model(**SIZES), scale=0.05)


@pytest.fixture(scope="module")
def tensors(model):
    return {name: np.asarray(a) for name, a in convert.to_official(model).items()}


@pytest.fixture(scope="module")
def ours(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_file(tensors, folder / "dit.safetensors")
    convert.main([str(folder / "dit.safetensors"), str(folder / "ours"), "--num-heads", "13"])
    return folder / "ours"


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_official_to_ours_and_back_is_bit_exact(model, tensors, ours, tmp_path):
    loaded, config = checkpoint.load(ours)
    x, t, y = inputs(model)
    np.testing.assert_array_equal(loaded(x, t, y), model(x, t, y))
    m = config.model
    assert (m.hidden_size, m.depth, m.num_heads, m.patch_size, m.mlp_ratio) == (52, 3, 13, 2, 4.0)
    assert (config.data.image_size, config.data.num_classes, config.objective.variance) == (48, 11, "learned_range")
    convert.main([str(ours), str(tmp_path / "again.safetensors"), "--to", "official"])
    assert equal(load_file(tmp_path / "again.safetensors"), tensors)


def test_diffusers_to_ours_and_back_is_bit_exact(ours, tmp_path):
    convert.main([str(ours), str(tmp_path / "theirs"), "--to", "diffusers"])
    convert.main([str(tmp_path / "theirs"), str(tmp_path / "ours")])
    convert.main([str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "diffusers"])
    weights = [load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("theirs", "again")]
    assert equal(*weights) and len(weights[0]) == 3 * (6 + 12 + 2) - 3 + 6
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["num_attention_heads"] == 13 and config["sample_size"] == 6 and config["out_channels"] == 8
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "theirs").rename(tmp_path / "pipeline/transformer")
    convert.main([str(tmp_path / "pipeline"), str(tmp_path / "from_pipeline")])
    for a, b in zip(*(jax.tree.leaves(checkpoint.load(tmp_path / name)[0]) for name in ("ours", "from_pipeline")), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [256, 512])
def test_every_key_and_shape_of_xl2(size):
    """The published files' 12 + 10 * 28 tensors, written out, and the sizes that are read off them."""
    D = 1152
    linear = lambda name, inputs, outputs: {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}  # noqa: E731
    expected = {"pos_embed": (1, (size // 16) ** 2, D), "x_embedder.proj.weight": (D, 4, 2, 2), "x_embedder.proj.bias": (D,),
                "y_embedder.embedding_table.weight": (1001, D), **linear("t_embedder.mlp.0", 256, D), **linear("t_embedder.mlp.2", D, D),
                **linear("final_layer.linear", D, 2 * 2 * 8), **linear("final_layer.adaLN_modulation.1", D, 2 * D)}
    for i in range(28):
        expected |= linear(f"blocks.{i}.attn.qkv", D, 3 * D) | linear(f"blocks.{i}.attn.proj", D, D)
        expected |= linear(f"blocks.{i}.mlp.fc1", D, 4 * D) | linear(f"blocks.{i}.mlp.fc2", 4 * D, D)
        expected |= linear(f"blocks.{i}.adaLN_modulation.1", D, 6 * D)
    preset = dit_config.load(f"imagenet{size}_xl2")
    abstract = jax.eval_shape(lambda: make_model(preset, jax.random.key(0)))
    official = jax.eval_shape(convert.to_official, abstract)
    assert {name: a.shape for name, a in official.items()} == expected and len(expected) == 12 + 10 * 28
    found = convert.infer_config(official, None, "DiT-XL-2-256x256.pt")
    assert found.name == "DiT-XL/2" and found.input_shape == (size // 8, size // 8, 4) and found.data.class_names[207] == "golden retriever"
    assert [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda: make_model(found, jax.random.key(0))))] == [
        leaf.shape for leaf in jax.tree.leaves(abstract)]
    theirs = jax.eval_shape(convert.to_diffusers, official)
    assert len(theirs) == 2 + 28 * (5 + 6 + 8) + 4 and theirs["transformer_blocks.27.attn1.to_v.weight"].shape == (D, D)


def faulty(tensors, tmp_path, change):
    changed = {name: a.copy() for name, a in tensors.items()}
    change(changed)
    save_file(changed, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors", tmp_path / "out", "--num-heads", "13"


def transpose(name):
    return lambda d: d.update({name: np.ascontiguousarray(d[name].T)})


@pytest.mark.parametrize("change, words", [
    (lambda d: d.pop("blocks.1.mlp.fc1.bias"), "blocks.1.mlp.fc1.bias is missing; it should be of shape (208,)"),
    (lambda d: d.update({"blocks.1.mlp.gate": np.zeros(3)}), "blocks.1.mlp.gate of shape (3,) is unknown; it should not be there"),
    (transpose("blocks.1.mlp.fc1.weight"), "blocks.1.mlp.fc1.weight has shape (52, 208), which should be (208, 52): it is transposed"),
    (lambda d: d.update({"t_embedder.mlp.0.weight": np.zeros((52, 128))}), "t_embedder.mlp.0.weight has shape (52, 128), which should be"),
    (lambda d: d.update(pos_embed=d["pos_embed"][:, ::-1].copy()), "pos_embed should hold the fixed 2-D sin-cos positions"),
    (lambda d: d.pop("x_embedder.proj.weight"), "x_embedder.proj.weight is missing; it should be a DiT of the authors' release"),
    (lambda d: d.update({"x_embedder.proj.weight": np.zeros((52, 4))}), "x_embedder.proj.weight has shape (52, 4), which should have 4"),
    (lambda d: d.update({"x_embedder.proj.weight": np.zeros((52, 3, 2, 2))}), "should be of a model of 4 latent channels"),
])
def test_every_tensor_is_accounted_for(refused, tensors, tmp_path, change, words):
    assert words in refused(convert.main, *faulty(tensors, tmp_path, change))
    assert not (tmp_path / "out").exists()


def test_heads_that_no_shape_says_must_be_given(refused, tensors, tmp_path):
    source, out, *_ = faulty(tensors, tmp_path, lambda d: None)
    assert "--num-heads: missing; no shape says it, and the width 52 is none of 384, 768" in refused(convert.main, source, out)


def test_copies_that_differ_are_refused(refused, ours, tmp_path):
    convert.main([str(ours), str(tmp_path / "theirs"), "--to", "diffusers"])
    weights = load_file(tmp_path / "theirs/diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    save_file(weights | {name: weights[name] + 1}, tmp_path / "theirs/diffusion_pytorch_model.safetensors")
    assert f"{name} differs from transformer_blocks.0.norm1" in refused(convert.main, tmp_path / "theirs", tmp_path / "out")


def test_sources_that_cannot_be_are_refused(refused, tensors, ours, tmp_path, monkeypatch):
    source, out, *heads = faulty(tensors, tmp_path, lambda d: None)
    source.write_bytes(source.read_bytes()[:-100])
    assert f"{source}: should be a whole safetensors file" in refused(convert.main, source, out, *heads)
    assert "should be a file of weights, and there is none" in refused(convert.main, tmp_path / "nothing.pt", out)
    assert "config.json: should be the config.json of a diffusers DiTTransformer2DModel" in refused(convert.main, tmp_path, out)
    assert "OUT: " in (line := refused(convert.main, source, ours)) and "a name that is not taken yet" in line
    assert "OUT: 'x.bin' should be a .pt or .safetensors file" in refused(convert.main, ours, "x.bin", "--to", "official")
    before = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: before("absent" if name == "torch" else name, *rest))
    (tmp_path / "x.pt").write_bytes(b"x")
    assert "a .pt file needs PyTorch: pip install" in refused(convert.main, tmp_path / "x.pt", out)
    assert not out.exists()


def test_what_the_other_layouts_cannot_hold_is_refused(refused, ours, tmp_path):
    config = checkpoint.load(ours)[1]
    masked = dataclasses.replace(config, data=dataclasses.replace(config.data, latents=None, mask_classes=2))
    checkpoint.save_weights(tmp_path / "masked", jax.jit(lambda: make_model(masked, jax.random.key(0)))(), masked)
    for layout in ("official", "diffusers"):
        told = refused(convert.main, tmp_path / "masked", tmp_path / "out.safetensors", "--to", layout)
        assert "data.mask_classes: 2 should be 0" in told
    assert not (tmp_path / "out.safetensors").exists()


def test_converted_weights_are_no_run(refused, ours):
    with pytest.raises(InputError, match="ema: False should be True: these are converted weights"):
        checkpoint.load(ours, ema=False)
    flags = ["--workdir", ours, "--model.hidden-size", 52, "--model.num-heads", 13, "--model.depth", 3]
    assert "it holds converted weights, from which no run goes on" in refused(train.main, "digits", *flags)


def test_a_vae_goes_through_a_file(tmp_path):
    folder = write_vae(tmp_path / "vae")
    vae = load_vae(folder)
    x = jax.random.uniform(jax.random.key(0), (2, 24, 16, 3), minval=-1)
    encode, decode = jax.jit(lambda vae, x: vae.encode(x)), jax.jit(lambda vae, z: vae.decode(z))
    mean, log_variance = encode(vae, x)
    assert mean.shape == log_variance.shape == (2, 3, 2, 4) and decode(vae, mean).shape == x.shape
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(folder, tmp_path / "pipeline/vae")
    np.testing.assert_array_equal(encode(load_vae(tmp_path / "pipeline"), x)[0], mean)


@pytest.mark.parametrize("change, words", [
    (dict(latent_channels=16), "latent_channels: 16 should be 4"),
    (dict(block_out_channels=[8, 8, 12]), "block_out_channels: [8, 8, 12] should be four widths"),
    (dict(block_out_channels=[8, 8, 12, 20]), "has shape"),
    (dict(_class_name="VQModel"), "_class_name: 'VQModel' should be 'AutoencoderKL'"),
    (dict(norm_num_groups=5), "should describe an AutoencoderKL"),
])
def test_a_vae_of_another_shape_is_refused(tmp_path, change, words):
    folder = write_vae(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError) as refusal:
        load_vae(folder)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_inception_file_of_another_kind_is_refused(tmp_path):
    save_file({"fc.weight": np.zeros((1000, 2048), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"Conv2d_1a_3x3.bn.bias is missing|Conv2d_1a_3x3.* is missing"):
        load_inception(tmp_path / "x.safetensors")
