"""Weights in the authors' and in diffusers' layout, and the published VAE and Inception.

All in .safetensors files, without PyTorch; test_parity_weights.py reads .pt files.
"""

import builtins
import errno
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import awaken, inputs, run_train, tiny_config, tiny_model, write_vae
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dit import checkpoint, cli, intact
from dit.config import InputError, replace
from dit.imagenet import convert
from dit.imagenet.diffusers import to_diffusers
from dit.imagenet.inception import load_inception
from dit.imagenet.official import infer_config, to_official
from dit.imagenet.tensors import DESCRIPTION
from dit.imagenet.vae import load_vae
from dit.state import make_model

SIZES = dict(
    hidden_size=52, num_heads=13, in_channels=4, input_size=6, patch_size=2, num_classes=11
)
HEADS = ("--num-heads", 13)


def convert_command(*argv):
    """What `python -m dit.imagenet.convert *argv` does."""
    with cli.exit_status("dit.imagenet.convert"):
        options = cli.parse(convert.Convert, [str(a) for a in argv], "dit.imagenet.convert", "")
        convert.run(options)


@pytest.fixture(scope="module")
def model():
    return awaken(tiny_model(**SIZES), scale=0.05)


@pytest.fixture(scope="module")
def tensors(model):
    return {name: np.asarray(tensor) for name, tensor in to_official(model).items()}


@pytest.fixture(scope="module")
def ours(tensors, tmp_path_factory):
    """The folder that the command makes of the model's official tensors."""
    folder = tmp_path_factory.mktemp("weights")
    save_file(tensors, folder / "dit.safetensors")
    convert_command(folder / "dit.safetensors", folder / "new/ours", *HEADS)
    return folder / "new/ours"


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def assert_same_model(folder, other):
    (a, _), (b, _) = checkpoint.load(folder), checkpoint.load(other)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# There and back


def test_official_to_ours_and_back_is_bit_exact(model, tensors, ours, tmp_path):
    loaded, _ = checkpoint.load(ours)
    x, t, y = inputs(model)
    np.testing.assert_array_equal(loaded(x, t, y), model(x, t, y))
    convert_command(ours, tmp_path / "new/again.safetensors", "--to", "official")
    assert_same(load_file(tmp_path / "new/again.safetensors"), tensors)


def test_sizes_and_names_are_read_off_the_shapes(ours, tmp_path, capsys, tensors):
    _, config = checkpoint.load(ours)
    sizes = config.model
    assert (sizes.hidden_size, sizes.depth, sizes.num_heads) == (52, 3, 13)
    assert (sizes.patch_size, sizes.mlp_ratio) == (2, 4.0)
    assert (config.data.image_size, config.data.num_classes) == (48, 11)
    assert config.objective.variance == "learned_range"
    facts = intact.stored_dataset(ours, 0)
    assert facts["class_names"] == [str(k) for k in range(11)]
    assert convert.class_names(1000)[207] == "golden retriever"
    save_file(tensors, tmp_path / "dit.safetensors")
    convert_command(tmp_path / "dit.safetensors", tmp_path / "again", *HEADS)
    line = "DiT, width 52, 3 blocks, 13 heads, patch 2, 48x48, 11 classes"
    assert f"wrote {tmp_path / 'again'}: {line}" in capsys.readouterr().out


def test_diffusers_to_ours_and_back_is_bit_exact(ours, tmp_path):
    convert_command(ours, tmp_path / "theirs", "--to", "diffusers")
    convert_command(tmp_path / "theirs", tmp_path / "ours")
    convert_command(tmp_path / "ours", tmp_path / "again", "--to", "diffusers")
    theirs, again = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
        for name in ("theirs", "again")
    )
    assert_same(theirs, again)
    assert len(theirs) == 3 * (6 + 12 + 2) - 3 + 6
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["num_attention_heads"] == 13
    assert config["sample_size"] == 6
    assert config["out_channels"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("out", ["theirs.safetensors", "theirs"])
@pytest.mark.parametrize("learns_variance", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_model_of_ones_own_goes_there_and_back_with_its_config(
    tmp_path, channels, learns_variance, out
):
    """Heads, noise schedule and classes are in the metadata: nothing is asked for."""
    config = tiny_config(
        data=dict(channels=min(channels, 3), num_classes=3, image_size=48),
        objective=dict(variance="learned_range" if learns_variance else "fixed_small"),
        model=dict(patch_size=3 if channels == 4 else 12),
    )
    if channels == 4:
        config = replace(config, data=dict(latents="x", image_size=48))
    model = awaken(jax.jit(lambda: make_model(config, jax.random.key(0)))())
    names = ("cat", "dog", "horse")
    checkpoint.save_weights(tmp_path / "ours", model, config, names)
    layout = "official" if out.endswith(".safetensors") else "diffusers"
    convert_command(tmp_path / "ours", tmp_path / out, "--to", layout)
    convert_command(tmp_path / out, tmp_path / "again")
    assert_same_model(tmp_path / "ours", tmp_path / "again")
    assert checkpoint.load(tmp_path / "again")[1] == config
    assert intact.stored_dataset(tmp_path / "again", 0)["class_names"] == list(names)


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A model of pixels in the authors' layout, as we write it."""
    folder = tmp_path_factory.mktemp("described")
    config = tiny_config(objective=dict(variance="fixed_small"))
    model = awaken(jax.jit(lambda: make_model(config, jax.random.key(0)))())
    checkpoint.save_weights(folder / "ours", model, config, tuple("0123456789"))
    convert_command(folder / "ours", folder / "x.safetensors", "--to", "official")
    return folder / "x.safetensors"


def test_a_model_of_pixels_without_metadata_is_one_once_its_heads_are_given(
    refused, described, tmp_path, capsys
):
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(described), bare)
    assert "--num-heads: missing;" in refused(convert_command, bare, tmp_path / "x")
    capsys.readouterr()
    convert_command(bare, tmp_path / "x", "--num-heads", 5)
    line = f"{bare} says no noise schedule: taken for the authors', 1000 timesteps, linear"
    assert capsys.readouterr().out.splitlines()[0] == line
    loaded, config = checkpoint.load(tmp_path / "x")
    assert config.input_shape == (8, 8, 1)
    assert config.data.latents is None
    assert not loaded.learn_sigma


def change_description(described, tmp_path, change):
    with safe_open(described, framework="numpy") as file:
        values = json.loads(file.metadata()[DESCRIPTION])
    change(values)
    text = json.dumps(values)
    save_file(load_file(described), tmp_path / "x.safetensors", metadata={DESCRIPTION: text})
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda values: values.clear(),
            "metadata 'minimal_dit' should be a config and class names",
        ),
        (
            lambda values: values.update(class_names=["one"]),
            "class_names: ['one'] should be the names of 10 classes",
        ),
        (
            lambda values: values["config"]["model"].update(width=3),
            "model.width: 3 should be left out: this version has no such field",
        ),
        (
            lambda values: values["config"]["model"].update(depth=10**9),
            "model.depth: 1000000000 should be 2, as its tensors say",
        ),
        (
            lambda values: values["config"]["model"].update(mlp_ratio=1e30),
            "model.mlp_ratio: 1e+30 should be near 4, as its tensors say",
        ),
        (
            lambda values: values["config"]["data"].update(image_size=4096),
            "input_shape: (4096, 4096, 1) should be (8, 8, 1), as its tensors say",
        ),
        (
            lambda values: values["config"]["model"].update(conditioning="cross_attention"),
            "model.conditioning: 'cross_attention' should be 'adaln_zero', as its tensors say",
        ),
        (
            lambda values: values["config"]["objective"].update(variance="learned_range"),
            "objective.learns_variance: True should be False, as its tensors say",
        ),
    ],
)
def test_a_description_that_the_tensors_contradict_is_refused(
    refused, described, tmp_path, change, words
):
    source = change_description(described, tmp_path, change)
    line = refused(convert_command, source, tmp_path / "out")
    assert line.startswith(f"dit.imagenet.convert: {source}: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_heads_that_the_file_contradicts_are_refused(refused, ours, described, tmp_path):
    convert_command(ours, tmp_path / "theirs", "--to", "diffusers")
    for source, heads in [(described, 5), (tmp_path / "theirs", 13)]:
        line = refused(convert_command, source, tmp_path / "out", "--num-heads", 4)
        assert f"--num-heads: 4 should be {heads}, as {source} says" in line


def test_a_pipelines_transformer_is_found_in_its_folder(ours, tmp_path):
    convert_command(ours, tmp_path / "pipeline/transformer", "--to", "diffusers")
    convert_command(tmp_path / "pipeline", tmp_path / "from_pipeline")
    assert_same_model(ours, tmp_path / "from_pipeline")


def test_what_a_killed_conversion_left_does_not_get_in_the_way(ours, tmp_path):
    (tmp_path / "theirs.tmp/half").mkdir(parents=True)
    convert_command(ours, tmp_path / "theirs", "--to", "diffusers")
    assert not (tmp_path / "theirs/half").exists()
    convert_command(tmp_path / "theirs", tmp_path / "again")
    assert_same_model(ours, tmp_path / "again")


# The published files


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def xl2_shapes(size: int) -> dict[str, tuple[int, ...]]:
    """The 12 + 10 * 28 tensors of DiT-XL-2, written out."""
    D = 1152
    shapes = {
        "pos_embed": (1, (size // 16) ** 2, D),
        "x_embedder.proj.weight": (D, 4, 2, 2),
        "x_embedder.proj.bias": (D,),
        "y_embedder.embedding_table.weight": (1001, D),
    }
    shapes |= linear("t_embedder.mlp.0", 256, D) | linear("t_embedder.mlp.2", D, D)
    shapes |= linear("final_layer.linear", D, 2 * 2 * 8)
    shapes |= linear("final_layer.adaLN_modulation.1", D, 2 * D)
    for i in range(28):
        block = f"blocks.{i}"
        shapes |= linear(f"{block}.attn.qkv", D, 3 * D) | linear(f"{block}.attn.proj", D, D)
        shapes |= linear(f"{block}.mlp.fc1", D, 4 * D) | linear(f"{block}.mlp.fc2", 4 * D, D)
        shapes |= linear(f"{block}.adaLN_modulation.1", D, 6 * D)
    return shapes


def abstract(config):
    return jax.eval_shape(lambda: make_model(config, jax.random.key(0)))


@pytest.mark.parametrize("size", [256, 512])
def test_every_key_and_shape_of_xl2(size):
    expected = xl2_shapes(size)
    model = abstract(cli.load_preset(f"imagenet{size}_xl2"))
    official = jax.eval_shape(to_official, model)
    assert {name: tensor.shape for name, tensor in official.items()} == expected
    assert len(expected) == 12 + 10 * 28

    config = infer_config(official, None, "DiT-XL-2-256x256.pt")
    assert (config.name, config.data.name) == ("DiT-XL/2", "imagenet2012")
    assert config.input_shape == (size // 8, size // 8, 4)
    inferred = jax.tree.leaves(abstract(config))
    assert [leaf.shape for leaf in inferred] == [leaf.shape for leaf in jax.tree.leaves(model)]

    theirs = jax.eval_shape(to_diffusers, official)
    assert len(theirs) == 2 + 28 * (5 + 6 + 8) + 4
    assert theirs["transformer_blocks.27.attn1.to_v.weight"].shape == (1152, 1152)


# Refusals


def faulty(tensors, tmp_path, change) -> tuple:
    """The arguments of a conversion of changed tensors."""
    changed = {name: tensor.copy() for name, tensor in tensors.items()}
    change(changed)
    save_file(changed, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors", tmp_path / "out", *HEADS


def without(name):
    return lambda tensors: tensors.pop(name)


def having(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def changing(name, function):
    return lambda tensors: tensors.update({name: np.ascontiguousarray(function(tensors[name]))})


FAULTS = [
    (
        without("blocks.1.mlp.fc1.bias"),
        "blocks.1.mlp.fc1.bias is missing; it should be of shape (208,)",
    ),
    (
        having("blocks.1.mlp.gate", np.zeros(3)),
        "blocks.1.mlp.gate of shape (3,) is unknown; it should not be there",
    ),
    (
        changing("blocks.1.mlp.fc1.weight", np.transpose),
        "blocks.1.mlp.fc1.weight has shape (52, 208), which should be (208, 52): it is transposed",
    ),
    (
        having("t_embedder.mlp.0.weight", np.zeros((52, 128))),
        "t_embedder.mlp.0.weight has shape (52, 128), which should be",
    ),
    (
        changing("pos_embed", lambda tensor: tensor[:, ::-1]),
        "pos_embed should hold the fixed 2-D sin-cos positions",
    ),
    (
        without("x_embedder.proj.weight"),
        "x_embedder.proj.weight is missing; it should be a DiT of the authors' release",
    ),
    (
        having("x_embedder.proj.weight", np.zeros((52, 4))),
        "x_embedder.proj.weight has shape (52, 4), which should have 4 axes",
    ),
    (
        having("x_embedder.proj.weight", np.zeros((0, 4, 2, 2))),
        "x_embedder.proj.weight: (0, 4, 2, 2) should be of more than 0 along each axis",
    ),
    (
        having("blocks.1000.mlp", np.zeros(3)),
        "blocks.1000.mlp of shape (3,) is unknown; it should not be there",
    ),
    (
        having(f"blocks.{'9' * 5000}.mlp", np.zeros(3)),
        "9.mlp of shape (3,) is unknown; it should not be there",
    ),
    (
        having("y_embedder.embedding_table.weight", np.zeros((1, 52))),
        "x.safetensors: data.num_classes: 0 should be more than 0",
    ),
    (
        having("pos_embed", np.zeros((1, 9, 1))),
        "pos_embed: (1, 9, 1) should be of the width 52, that of x_embedder.proj.weight",
    ),
    (
        having("x_embedder.proj.weight", np.zeros((52, 5, 2, 2))),
        "x_embedder.proj.weight: (52, 5, 2, 2) should be of a model of 4 latent channels, or of 1",
    ),
    (
        having("x_embedder.proj.weight", np.zeros((52, 3, 2, 2))),
        "final_layer.linear.bias has shape (32,), which should be (12,)",
    ),
]


@pytest.mark.parametrize("change, words", FAULTS)
def test_every_tensor_is_accounted_for(refused, tensors, tmp_path, change, words):
    assert words in refused(convert_command, *faulty(tensors, tmp_path, change))
    assert not (tmp_path / "out").exists()


def test_heads_that_no_shape_says_must_be_given(refused, tensors, tmp_path):
    source, out, *_ = faulty(tensors, tmp_path, lambda tensors: None)
    line = refused(convert_command, source, out)
    assert "--num-heads: missing; no shape says it, and the width 52 is none of 384, 768" in line


def test_copies_that_differ_are_refused(refused, ours, tmp_path):
    convert_command(ours, tmp_path / "theirs", "--to", "diffusers")
    path = tmp_path / "theirs/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    save_file(weights | {name: weights[name] + 1}, path)
    line = refused(convert_command, tmp_path / "theirs", tmp_path / "out")
    assert f"{name} differs from transformer_blocks.0.norm1" in line
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_are_refused(refused, tensors, tmp_path, monkeypatch):
    source, out, *_ = faulty(tensors, tmp_path, lambda tensors: None)
    source.write_bytes(source.read_bytes()[:-100])
    assert f"{source}: should be a whole safetensors file" in refused(convert_command, source, out)
    missing = tmp_path / "nothing.pt"
    words = f"{missing}: should be a file of weights, and there is none"
    assert words in refused(convert_command, missing, out)
    words = "config.json: should be the config.json of a diffusers DiTTransformer2DModel"
    assert words in refused(convert_command, tmp_path, out)

    before = builtins.__import__

    def without_torch(name, *rest):
        return before("absent" if name == "torch" else name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    (tmp_path / "x.pt").write_bytes(b"x")
    words = "a .pt file needs PyTorch: pip install"
    assert words in refused(convert_command, tmp_path / "x.pt", out)
    assert not out.exists()


def test_a_config_that_describes_no_dit_is_refused(refused, ours, tmp_path):
    convert_command(ours, tmp_path / "theirs", "--to", "diffusers")
    path = tmp_path / "theirs/config.json"
    config = json.loads(path.read_text())
    source = tmp_path / "theirs/diffusion_pytorch_model.safetensors"
    for change, words in [
        (dict(num_layers="three"), "num_layers: 'three' should be of type int"),
        (dict(num_layers=300), f"num_layers: 300 should be 3, the blocks in {source}"),
        (dict(attention_head_dim=8), f"{source}: pos_embed.proj.weight: (52, 4, 2, 2) should be"),
        (dict(patch_size=0), "patch_size: 0 should be more than 0"),
        (dict(patch_size=2.0), "patch_size: 2.0 should be of type int"),
        (dict(num_attention_heads=-13, attention_head_dim=-4), "heads: -13 should be more than 0"),
        (dict(sample_size=None), "sample_size: None should be of type int"),
        (dict(sample_size=514), "sample_size: 514 should be at most 512"),
        (dict(_class_name="UNet"), "_class_name: 'UNet' should be"),
    ]:
        path.write_text(json.dumps(config | change))
        line = refused(convert_command, tmp_path / "theirs", tmp_path / "out")
        assert words in line
        assert str(path) in line
    assert not (tmp_path / "out").exists()


def test_names_that_cannot_be_written_are_refused(refused, ours, tmp_path, monkeypatch):
    line = refused(convert_command, ours, ours)
    assert f"OUT: {str(ours)!r} should be a name that is not taken yet" in line
    (tmp_path / "file").touch()
    words = f"should be in a folder, which {str(tmp_path / 'file')!r} is not"
    assert words in refused(convert_command, ours, tmp_path / "file/new/out")
    words = "OUT: 'gs://x/y' should be a path of this host's file system, not of a bucket"
    assert words in refused(convert_command, ours, "gs://x/y")
    words = "OUT: 'x.bin' should be a .pt or .safetensors file"
    assert words in refused(convert_command, ours, "x.bin", "--to", "official")

    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(convert.tempfile, "TemporaryFile", read_only)
    words = "should be in a folder that can be written (Read-only file system)"
    assert words in refused(convert_command, ours, "x.pt", "--to", "official")


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize(
    "sections, words",
    [
        (dict(data=dict(latents=None, mask_classes=2)), "data.mask_classes: 2 should be 0"),
        (dict(model=dict(conditioning="adaln")), "'adaln' should be of adaln_zero blocks"),
        (
            dict(objective=dict(name="flow"), train=dict(sampler=None)),
            "objective.name: 'flow' should be ddpm",
        ),
    ],
)
def test_what_the_other_layouts_cannot_hold_is_refused(
    refused, ours, tmp_path, sections, words, layout
):
    config = replace(checkpoint.load(ours)[1], **sections)
    model = jax.jit(lambda: make_model(config, jax.random.key(0)))()
    checkpoint.save_weights(tmp_path / "other", model, config, convert.class_names(11))
    out = tmp_path / "out.safetensors"
    assert words in refused(convert_command, tmp_path / "other", out, "--to", layout)
    assert not out.exists()


def test_an_mlp_of_another_width_is_official_but_none_of_diffusers(refused, ours, tmp_path):
    config = replace(checkpoint.load(ours)[1], model=dict(mlp_ratio=2.0))
    model = jax.jit(lambda: make_model(config, jax.random.key(0)))()
    checkpoint.save_weights(tmp_path / "narrow", model, config, convert.class_names(11))
    words = "SOURCE: model.mlp_ratio: 2.0 should be 4"
    assert words in refused(convert_command, tmp_path / "narrow", tmp_path / "x", "--to=diffusers")
    convert_command(tmp_path / "narrow", tmp_path / "x.safetensors", "--to", "official")
    convert_command(tmp_path / "x.safetensors", tmp_path / "again", *HEADS)
    assert_same_model(tmp_path / "narrow", tmp_path / "again")


def test_the_label_of_augmentation_is_left_out_which_sampling_never_gives(tmp_path):
    model = awaken(tiny_model(**SIZES, augment_size=5))
    save_file({k: np.asarray(v) for k, v in to_official(model).items()}, tmp_path / "x.safetensors")
    convert_command(tmp_path / "x.safetensors", tmp_path / "ours", *HEADS)
    loaded, _ = checkpoint.load(tmp_path / "ours")
    np.testing.assert_array_equal(loaded(*inputs(model)), model(*inputs(model)))


def test_of_several_averages_one_is_converted(ours, model, tmp_path):
    config = replace(checkpoint.load(ours)[1], optim=dict(ema_decay=(0.9, 0.8)))
    other = awaken(model, seed=3)
    for name, weights in [("run", model), ("other", other)]:
        checkpoint.save_weights(tmp_path / name, weights, config, convert.class_names(11))
    folder = tmp_path / "run/checkpoints/0"
    shutil.copytree(tmp_path / "other/checkpoints/0/ema", folder / "ema_0.8")
    (folder / "checksums.json").write_text(json.dumps(intact.checksums(folder)))
    for flags, expected in [
        ([], model),
        (["--ema-decay", 0.9], model),
        (["--ema-decay", 0.8], other),
    ]:
        out = tmp_path / f"{len(flags)}-{expected is other}.safetensors"
        convert_command(tmp_path / "run", out, "--to", "official", *flags)
        assert_same(load_file(out), {k: np.asarray(v) for k, v in to_official(expected).items()})


def test_converted_weights_are_no_run(refused, ours):
    with pytest.raises(InputError, match="ema: False should be True: converted weights are one"):
        checkpoint.load(ours, ema=False)
    sizes = ["--model.hidden-size", 52, "--model.num-heads", 13, "--model.depth", 3]
    line = refused(run_train, "digits", "--workdir", ours, *sizes)
    assert "it holds converted weights, from which no run goes on" in line


# The networks that are only read


def test_a_vae_goes_through_a_file(tmp_path):
    folder = write_vae(tmp_path / "vae")
    vae = load_vae(folder)
    x = jax.random.uniform(jax.random.key(0), (2, 24, 16, 3), minval=-1)
    encode = jax.jit(lambda vae, x: vae.encode(x))
    mean, log_variance = encode(vae, x)
    assert mean.shape == log_variance.shape == (2, 3, 2, 4)
    assert jax.jit(lambda vae, z: vae.decode(z))(vae, mean).shape == x.shape
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(vae)} == {"float32"}
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(folder, tmp_path / "pipeline/vae")
    np.testing.assert_array_equal(encode(load_vae(tmp_path / "pipeline"), x)[0], mean)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(latent_channels=16), "latent_channels: 16 should be 4"),
        (dict(block_out_channels=[8, 8, 12]), "[8, 8, 12] should be 4 widths, for a factor of 8"),
        (dict(block_out_channels=[8, 8, 12, 20]), "has shape"),
        (dict(_class_name="VQModel"), "_class_name: 'VQModel' should be 'AutoencoderKL'"),
        (dict(norm_num_groups=5), "should describe an AutoencoderKL"),
        (dict(block_out_channels=[8, 8, 12, True]), "should be 4 widths, for a factor of 8"),
        (dict(layers_per_block=3), "layers_per_block: 3 should be as many as the 184 tensors fill"),
        (dict(layers_per_block=2), "up_blocks.0.resnets.2.conv1.bias is missing"),
        (dict(layers_per_block=True), "layers_per_block: True should be as many as the 184"),
        (dict(layers_per_block="one"), "layers_per_block: 'one' should be as many as the 184"),
        (dict(layers_per_block=0), "layers_per_block: 0 should be as many as the 184 tensors"),
    ],
)
def test_a_vae_of_another_shape_is_refused(tmp_path, change, words):
    folder = write_vae(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError) as refusal:
        load_vae(folder)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_inception_file_of_another_kind_is_refused(tmp_path):
    save_file({"fc.weight": np.zeros((1000, 2048), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"Conv2d_1a_3x3.* is missing"):
        load_inception(tmp_path / "x.safetensors")
