"""The published formats held against diffusers, pytorch-fid and PyTorch's files. `make parity`."""

import argparse
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, inputs, run_sample, tiny_config, tiny_model
from PIL import Image
from test_parity import relative

from dit import checkpoint, cli, sampling
from dit.imagenet import convert
from dit.imagenet.diffusers import diffusers_names
from dit.imagenet.inception import load_inception
from dit.imagenet.official import from_official, infer_config, to_official
from dit.imagenet.vae import load_vae
from dit.metrics import frechet_distance, gaussian_of
from dit.model import position_embedding
from dit.state import make_model

pytestmark = pytest.mark.parity
# a CPU build of torch lacks the compiled operators that this registers, and nothing needs them here
STUB = "torchvision._meta_registrations"
sys.modules.setdefault(STUB, types.ModuleType(STUB))

HEADS = ("--num-heads", 13)


def convert_command(*argv):
    """What `python -m dit.imagenet.convert *argv` does."""
    with cli.exit_status("dit.imagenet.convert"):
        options = cli.parse(convert.Convert, [str(a) for a in argv], "dit.imagenet.convert", "")
        convert.run(options)


def channels_first(x) -> "torch.Tensor":  # noqa: F821
    import torch

    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def channels_last(x) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def awake(**sizes):
    """A DiT on latents, so wide and deep that each transposition shows, with no zero parameter."""
    options = dict(
        hidden_size=52, num_heads=13, in_channels=4, input_size=8, patch_size=2, num_classes=11
    )
    return awaken(tiny_model(**(options | sizes)), scale=0.05)


def torch_official(model) -> dict:
    import torch

    return {name: torch.tensor(np.asarray(a)) for name, a in to_official(model).items()}


# The transformer


@pytest.fixture
def ours(tmp_path):
    """The folder of an awake model, as dit.imagenet.convert writes it, and the model."""
    official = {name: np.asarray(a) for name, a in to_official(awake()).items()}
    config = infer_config(official, 13, tmp_path)
    model = from_official(official, config, tmp_path)
    names = convert.class_names(config.data.num_classes)
    checkpoint.save_weights(tmp_path / "ours", model, config, names)
    return tmp_path / "ours", model


@pytest.fixture
def theirs(ours, tmp_path):
    """diffusers' model of the same weights. Its timestep frequencies are not the release's."""
    from diffusers import DiTTransformer2DModel

    folder, _ = ours
    convert_command(folder, tmp_path / "diffusers", "--to", "diffusers")
    return DiTTransformer2DModel.from_pretrained(tmp_path / "diffusers").eval()


def correct_frequencies(theirs):
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0


def test_dit_equals_diffusers(ours, theirs):
    import torch

    _, model = ours
    x, t, y = inputs(model)
    placed = channels_first(x), torch.tensor(np.asarray(t)), torch.tensor(np.asarray(y))
    found = channels_last(theirs(*placed).sample)
    assert relative(model(x, t, y), found) > 1e-4, "their frequencies"
    correct_frequencies(theirs)
    found = channels_last(theirs(*placed).sample)
    assert relative(model(x, t, y), found) < 1e-5


def test_dits_gradients_equal_those_of_diffusers(ours, theirs):
    import torch

    _, model = ours
    correct_frequencies(theirs)
    x, t, y = inputs(model)
    theirs_x = channels_first(x).requires_grad_()
    output = theirs(theirs_x, torch.tensor(np.asarray(t)), torch.tensor(np.asarray(y))).sample
    output.square().sum().backward()

    def loss(model, x):
        return jnp.square(model(x, t, y)).sum()

    gradient, x_gradient = jax.grad(loss, argnums=(0, 1))(model, x)
    assert relative(x_gradient, channels_last(theirs_x.grad)) < 1e-4
    parameters = dict(theirs.named_parameters())
    for name, ours_gradient in to_official(gradient).items():
        if name == "pos_embed":
            continue
        copies = [parameters.get(part) for part in diffusers_names(name, model.depth)]
        parts = [p.grad.numpy() for p in copies if p is not None and p.grad is not None]
        # of all the copies that are one parameter here
        total = np.concatenate(parts) if ".attn.qkv." in name else sum(parts)
        assert relative(ours_gradient, total) < 1e-4, name


def test_guidance_on_three_channels_is_the_published_behaviour():
    """The release samples so: halves share x, three channels are guided, the rest is kept."""
    model = awake()
    x, _, y = inputs(model, batch=2)
    t = jnp.array([123])
    null = jnp.full_like(y, model.num_classes)
    both = model(jnp.concatenate([x, x]), jnp.full(4, 123), jnp.concatenate([y, null]))
    eps, rest = both[..., :3], both[..., 3:]
    eps = eps[2:] + 4.0 * (eps[:2] - eps[2:])
    published = np.asarray(jnp.concatenate([eps, rest[:2]], axis=-1))
    condition = {"y": y}, {"y": null}
    found = sampling.guided(model, *condition, 4.0, cfg_channels=3)(x, t)
    assert relative(found, published) < 1e-5
    assert relative(sampling.guided(model, *condition, 4.0)(x, t), published) > 1e-3


# PyTorch's files


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_pt_files_go_through_bit_for_bit(tmp_path, learn_sigma):
    import torch

    model = awake(learn_sigma=learn_sigma)
    official = torch_official(model)
    torch.save(official, tmp_path / "a.pt")
    options = argparse.Namespace(model="DiT-XL/2")
    training = {"model": {}, "ema": official, "opt": {"state": {}}, "args": options}
    torch.save(training, tmp_path / "b.pt")
    for source in ("a.pt", "b.pt"):
        folder, out = tmp_path / f"ours-{source}", tmp_path / f"again-{source}"
        convert_command(tmp_path / source, folder, *HEADS)
        convert_command(folder, out, "--to", "official")
        again = torch.load(out, weights_only=True)
        assert again.keys() == official.keys()
        assert all(torch.equal(again[name], official[name]) for name in official)
    loaded, config = checkpoint.load(tmp_path / "ours-a.pt")
    x, t, y = inputs(model)
    np.testing.assert_array_equal(loaded(x, t, y), model(x, t, y))
    assert config.objective.variance == ("learned_range" if learn_sigma else "fixed_large")
    assert config.data.image_size == 64


def test_a_pt_file_of_ours_says_what_no_shape_does(tmp_path):
    import torch

    config = tiny_config(objective=dict(variance="fixed_small"))
    model = awaken(make_model(config, jax.random.key(0)))
    checkpoint.save_weights(tmp_path / "ours", model, config, tuple("abcdefghij"))
    convert_command(tmp_path / "ours", tmp_path / "x.pt", "--to", "official")
    convert_command(tmp_path / "x.pt", tmp_path / "again")
    loaded, stored = checkpoint.load(tmp_path / "again")
    assert stored == config
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    state_dict = torch.load(tmp_path / "x.pt", weights_only=True)
    module = torch.nn.Linear(20, 4)
    names = {"weight": "final_layer.linear.weight", "bias": "final_layer.linear.bias"}
    part = type(state_dict)((name, state_dict[name_there]) for name, name_there in names.items())
    part._metadata = state_dict._metadata
    module.load_state_dict(part)  # which reads the metadata of its own kind there


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_with_code_is_refused_and_the_code_not_run(refused, tmp_path):
    import torch

    source, out = tmp_path / "x.pt", tmp_path / "out"
    torch.save({"weights": Harmful(str(tmp_path / "ran"))}, source)
    words = f"{source}: should be a PyTorch state dict, readable without unpickling code"
    assert words in refused(convert_command, source, out)
    assert not (tmp_path / "ran").exists()
    assert not out.exists()


def test_pt_files_that_are_no_state_dict_are_refused(refused, tmp_path):
    import torch

    source, out = tmp_path / "x.pt", tmp_path / "out"
    source.write_bytes(b"not a checkpoint")
    assert f"{source}: should be a PyTorch state dict" in refused(convert_command, source, out)
    words = f"{source}: holds 'list', which should be a PyTorch state dict"
    torch.save([torch.zeros(3)], source)
    assert words in refused(convert_command, source, out)
    words = f"{source}: holds 'dict', which should be a PyTorch state dict: tensors by their names"
    expanded = torch.zeros(1).expand(3)  # one number, which says that it is three
    mixed = {"epoch": 3, "weights": torch.zeros(3)}
    for stored in (mixed, {3: torch.zeros(3)}, {}, {"weights": expanded}):
        torch.save(stored, source)
        assert words in refused(convert_command, source, out)
    torch.save({"fc.weight": torch.nn.Parameter(torch.zeros(3))}, source)
    assert "pos_embed is missing; it should be a DiT" in refused(convert_command, source, out)
    assert not out.exists()


# The networks that are only read


def randomised(module, seed=0):
    """A torch module with random weights and norms' statistics that keep the signal's size."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def random(shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.ndim > 1:
                tensor.copy_(random(tensor.shape) * (2 / tensor[0].numel()) ** 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(0.1 * random(tensor.shape) + name.endswith("weight"))
    return module.eval()


@pytest.fixture(scope="module")
def stable_diffusion_vae(tmp_path_factory):
    """diffusers' AutoencoderKL as Stable Diffusion configures it, randomised, and its folder."""
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
    )
    folder = tmp_path_factory.mktemp("weights") / "vae"
    randomised(theirs).save_pretrained(folder)
    return theirs, folder


def test_vae_equals_diffusers(stable_diffusion_vae):
    import torch

    theirs, folder = stable_diffusion_vae
    ours = load_vae(folder)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == 83_653_863
    assert sum(p.numel() for p in theirs.parameters()) == 83_653_863
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, 48, 40, 3)).astype(np.float32)
    z = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(channels_first(x)).latent_dist
        decoded = theirs.decode(channels_first(z)).sample
    mean, log_variance = jax.jit(lambda vae, x: vae.encode(x))(ours, x)
    assert relative(mean, channels_last(posterior.mean)) < 1e-4
    assert relative(log_variance, channels_last(posterior.logvar)) < 1e-4
    assert relative(jax.jit(lambda vae, z: vae.decode(z))(ours, z), channels_last(decoded)) < 1e-4


def old_names(tensors: dict, oldest: bool) -> dict:
    """The VAE's tensors as files of before 2023 have them."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            for new, old in names.items():
                name = name.replace(f".{new}.", f".{old}.")
            if oldest and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("kind", ["old", "oldest", "bin"])
def test_vae_files_of_all_ages_load(stable_diffusion_vae, tmp_path, kind):
    import torch
    from safetensors.torch import save_file

    theirs, folder = stable_diffusion_vae
    tensors = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    if kind == "bin":
        torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    else:
        renamed = old_names(tensors, kind == "oldest")
        save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    found, expected = jax.tree.leaves(load_vae(tmp_path)), jax.tree.leaves(load_vae(folder))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_inception_equals_pytorch_fid(monkeypatch, tmp_path):
    import torch
    from pytorch_fid import inception as pytorch_fid

    published = pytorch_fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    weights = randomised(published).state_dict()
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *a, **options: weights)
    network = pytorch_fid.fid_inception_v3()
    outputs = {}
    hooked = network.Mixed_6d.branch1x1
    hooked.register_forward_hook(lambda module, x, output: outputs.update(spatial=output))
    monkeypatch.setattr(pytorch_fid, "fid_inception_v3", lambda: network)
    theirs = pytorch_fid.InceptionV3().eval()
    torch.save(weights, tmp_path / "inception.pth")
    ours = load_inception(tmp_path / "inception.pth")

    # enlarged, and made smaller without antialiasing
    for shape in ((2, 32, 48, 3), (1, 320, 300, 3)):
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        with torch.no_grad():
            pool = theirs(channels_first(images).float() / 255)[0].squeeze((2, 3))
        spatial = channels_last(outputs["spatial"][:, :7]).reshape(len(images), -1)
        features = jax.jit(lambda network, images: network(images))(ours, images)
        assert relative(features.pool, pool.numpy()) < 1e-4
        assert relative(features.spatial, spatial) < 1e-4
        assert relative(features.logits, (pool @ weights["fc.weight"].T).numpy()) < 1e-4


def test_frechet_distance_equals_pytorch_fid(monkeypatch):
    from pytorch_fid.fid_score import calculate_frechet_distance
    from scipy import linalg

    sqrtm = linalg.sqrtm  # which pytorch-fid gives an argument that SciPy 1.18 does not have
    monkeypatch.setattr(linalg, "sqrtm", lambda a, disp: (sqrtm(a), None))
    rng = np.random.default_rng(0)
    a = gaussian_of(rng.normal(size=(97, 13)) @ rng.normal(size=(13, 13)))
    b = gaussian_of(1 + rng.normal(size=(89, 13)))
    assert frechet_distance(a, b) == pytest.approx(calculate_frechet_distance(*a, *b), rel=1e-6)


# The whole path


def test_from_a_published_file_to_pictures_of_256x256(stable_diffusion_vae, tmp_path):
    """A DiT-S/2 and Stable Diffusion's VAE, of random weights but of full size."""
    import torch

    config = cli.load_preset("imagenet256_s2")
    model = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, a in jax.eval_shape(to_official, model).items():
        tensors[name] = torch.tensor(0.02 * rng.normal(size=a.shape).astype(np.float32))
    tensors["pos_embed"] = torch.tensor(position_embedding(16, 384))
    torch.save({"ema": tensors}, tmp_path / "DiT-S-2-256x256.pt")
    convert_command(tmp_path / "DiT-S-2-256x256.pt", tmp_path / "s2")

    _, vae = stable_diffusion_vae
    classes = ["--classes", "golden retriever", 360, "--per-class", 1]
    guidance = ["--guidance", 4, "--cfg-channels", 3, "--steps", 5]
    out = tmp_path / "x.png"
    run_sample(tmp_path / "s2", "--vae", vae, *classes, *guidance, "--out", out)
    picture = Image.open(out)
    assert picture.height == 2 * 258 + 2
    assert np.asarray(picture).std() > 10
