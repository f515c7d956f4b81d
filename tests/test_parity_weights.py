"""The published formats held against the libraries that define them: diffusers, pytorch-fid, PyTorch's files. `make parity`."""

import argparse
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, inputs, tiny_model
from test_parity import relative

import sample
from dit import checkpoint, convert, sampling
from dit import config as dit_config
from dit.model import position_embedding
from dit.state import make_model
from dit.weights import load_inception, load_vae

pytestmark = pytest.mark.parity
# a CPU build of torch lacks the compiled operators that this registers, and nothing here needs them
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))


def awake(sizes=None):
    """A DiT on 4 latent channels, wide and deep enough to show every transposition, no parameter zero."""
    model = tiny_model(hidden_size=52, num_heads=13, in_channels=4, input_size=8, patch_size=2, num_classes=11, **(sizes or {}))
    return awaken(model, scale=0.05)


@pytest.fixture
def ours(tmp_path):
    """The folder of an awake model, as dit.convert writes it, and the model."""
    model = awake()
    official = {name: np.asarray(a) for name, a in convert.to_official(model).items()}
    model, config = convert.from_official(official, 13, tmp_path)
    checkpoint.save_weights(tmp_path / "ours", model, config)
    return tmp_path / "ours", model


def test_dit_equals_diffusers(ours, tmp_path):
    """Through a folder that diffusers itself reads. It differs from the release in its timestep frequencies, which are put right here."""
    import torch
    from diffusers import DiTTransformer2DModel

    folder, model = ours
    convert.main([str(folder), str(tmp_path / "diffusers"), "--to", "diffusers"])
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "diffusers")
    x, t, y = inputs(model)
    tx, tt, ty = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_(), torch.tensor(np.asarray(t)), torch.tensor(np.asarray(y))
    theirs.eval()
    assert relative(model(x, t, y), theirs(tx, tt, ty).sample.detach().permute(0, 2, 3, 1).numpy()) > 1e-4, "diffusers' frequencies"
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    out = theirs(tx, tt, ty).sample
    assert relative(model(x, t, y), out.detach().permute(0, 2, 3, 1).numpy()) < 1e-5

    out.square().sum().backward()
    grads, x_grad = jax.grad(lambda m, x: jnp.square(m(x, t, y)).sum(), argnums=(0, 1))(model, x)
    assert relative(x_grad, tx.grad.permute(0, 2, 3, 1).numpy()) < 1e-4
    found = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    summed = convert.to_official(grads)
    for name in summed.keys() - {"pos_embed"}:
        parts = [found.get(n) for n in convert.diffusers_names(name, model.depth)]
        parts = [part for part in parts if part is not None]
        theirs_grad = np.concatenate(parts) if ".attn.qkv." in name else sum(parts)  # of all the copies that are one parameter here
        assert relative(summed[name], theirs_grad) < 1e-4, name


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_pt_files_go_through_bit_for_bit(tmp_path, learn_sigma):
    import torch

    model = awake(dict(learn_sigma=learn_sigma))
    official = {name: torch.tensor(np.asarray(a)) for name, a in convert.to_official(model).items()}
    torch.save(official, tmp_path / "a.pt")
    torch.save({"model": {}, "ema": official, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XL/2")}, tmp_path / "b.pt")
    for source in ("a.pt", "b.pt"):
        convert.main([str(tmp_path / source), str(tmp_path / f"ours-{source}"), "--num-heads", "13"])
        convert.main([str(tmp_path / f"ours-{source}"), str(tmp_path / f"again-{source}"), "--to", "official"])
        again = torch.load(tmp_path / f"again-{source}", weights_only=True)
        assert again.keys() == official.keys() and all(torch.equal(again[name], official[name]) for name in official)
    loaded, config = checkpoint.load(tmp_path / "ours-a.pt")
    x, t, y = inputs(model)
    np.testing.assert_array_equal(loaded(x, t, y), model(x, t, y))
    assert config.objective.variance == ("learned_range" if learn_sigma else "fixed_large") and config.data.image_size == 64


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pt_files_that_are_none_are_refused_and_never_unpickled(refused, tmp_path):
    import torch

    source, out = tmp_path / "x.pt", tmp_path / "out"
    source.write_bytes(b"not a checkpoint")
    assert f"{source}: should be a PyTorch state dict" in refused(convert.main, source, out)
    torch.save({"weights": Harmful(str(tmp_path / "ran"))}, source)
    assert f"{source}: should be a PyTorch state dict, readable without unpickling code" in refused(convert.main, source, out)
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(3)], source)
    assert f"{source}: holds 'list', which should be a PyTorch state dict" in refused(convert.main, source, out)
    torch.save({"epoch": 3, "weights": torch.zeros(3)}, source)
    assert "which should be a PyTorch state dict: tensors by their names" in refused(convert.main, source, out)
    torch.save({3: torch.zeros(3)}, source)
    assert "which should be a PyTorch state dict: tensors by their names" in refused(convert.main, source, out)
    torch.save({"fc.weight": torch.nn.Parameter(torch.zeros(3))}, source)
    assert "pos_embed is missing; it should be a DiT" in refused(convert.main, source, out)
    assert not out.exists()


def test_guidance_on_three_channels_is_the_published_behaviour():
    """Written out as the paper's sampling does it: halves share x, eps of the first three channels is guided, the rest is kept."""
    model = awake()
    x, t, y = inputs(model, batch=2)
    both = model(jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([y, jnp.full_like(y, model.num_classes)]))
    eps, rest = both[..., :3], both[..., 3:]
    eps = eps[2:] + 4.0 * (eps[:2] - eps[2:])
    published = jnp.concatenate([eps, rest[:2]], axis=-1)
    ours = sampling.guided(model, y, model.num_classes, 4.0, cfg_channels=3)(x, t)
    assert relative(ours, np.asarray(published)) < 1e-5
    assert relative(sampling.guided(model, y, model.num_classes, 4.0)(x, t), np.asarray(published)) > 1e-3


def randomised(module, seed=0):
    """Random weights of a torch module, its norms' statistics among them, that keep the signal's size."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.ndim > 1:
                fan = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan) ** 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator) + (name.endswith("weight")))
    return module.eval()


@pytest.fixture(scope="module")
def stable_diffusion_vae(tmp_path_factory):
    """diffusers' AutoencoderKL as Stable Diffusion configures it, of random weights, and its folder."""
    from diffusers import AutoencoderKL

    theirs = randomised(AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2, latent_channels=4, norm_num_groups=32))
    folder = tmp_path_factory.mktemp("weights") / "vae"
    theirs.save_pretrained(folder)
    return theirs, folder


def test_vae_equals_diffusers(stable_diffusion_vae):
    import torch

    theirs, folder = stable_diffusion_vae
    ours = load_vae(folder)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == sum(p.numel() for p in theirs.parameters()) == 83_653_863
    rng = np.random.default_rng(0)
    x, z = rng.uniform(-1, 1, (2, 48, 40, 3)).astype(np.float32), rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist
        decoded = theirs.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample
    mean, log_variance = jax.jit(lambda m, x: m.encode(x))(ours, x)
    assert relative(mean, posterior.mean.permute(0, 2, 3, 1).numpy()) < 1e-4
    assert relative(log_variance, posterior.logvar.permute(0, 2, 3, 1).numpy()) < 1e-4
    assert relative(jax.jit(lambda m, z: m.decode(z))(ours, z), decoded.permute(0, 2, 3, 1).numpy()) < 1e-4


@pytest.mark.parametrize("kind", ["old", "oldest", "bin"])
def test_vae_files_of_all_ages_load(stable_diffusion_vae, tmp_path, kind):
    import torch
    from safetensors.torch import save_file

    theirs, folder = stable_diffusion_vae
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if ".attentions." in name and kind != "bin":
            for new, old in names.items():
                name = name.replace(f".{new}.", f".{old}.")
            if kind == "oldest" and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        tensors[name] = tensor.contiguous()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    if kind == "bin":
        torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    for a, b in zip(jax.tree.leaves(load_vae(tmp_path)), jax.tree.leaves(load_vae(folder)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inception_equals_pytorch_fid(monkeypatch, tmp_path):
    import torch
    from pytorch_fid import inception as pytorch_fid

    published = {}
    weights = randomised(pytorch_fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)).state_dict()
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *args, **options: weights)
    network = pytorch_fid.fid_inception_v3()
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, out: published.update(spatial=out))
    monkeypatch.setattr(pytorch_fid, "fid_inception_v3", lambda: network)
    theirs = pytorch_fid.InceptionV3().eval()
    torch.save(weights, tmp_path / "inception.pth")
    ours = load_inception(tmp_path / "inception.pth")
    for shape in ((2, 32, 48, 3), (1, 320, 300, 3)):  # enlarged, and made smaller without antialiasing
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        with torch.no_grad():
            pool = theirs(torch.tensor(images).permute(0, 3, 1, 2).float() / 255)[0].squeeze((2, 3))
        found = jax.jit(lambda m, x: m(x))(ours, images)
        assert relative(found.pool, pool.numpy()) < 1e-4
        assert relative(found.spatial, published["spatial"][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1).numpy()) < 1e-4
        assert relative(found.logits, (pool @ weights["fc.weight"].T).numpy()) < 1e-4


def test_frechet_distance_equals_pytorch_fid():
    from pytorch_fid.fid_score import calculate_frechet_distance

    from dit.fid import Moments, frechet_distance

    rng = np.random.default_rng(0)
    moments = [Moments(), Moments()]
    sets = [rng.normal(size=(97, 13)) @ rng.normal(size=(13, 13)), 1 + rng.normal(size=(89, 13))]
    for m, x in zip(moments, sets):
        m.add(x)
    a, b = (m.gaussian() for m in moments)
    assert frechet_distance(a, b) == pytest.approx(calculate_frechet_distance(*a, *b), rel=1e-6)


def test_the_whole_path_from_a_published_file_to_pictures_of_256x256(stable_diffusion_vae, tmp_path):
    """A DiT-S/2 and Stable Diffusion's VAE, of random weights but of full size."""
    import torch
    from PIL import Image

    abstract = jax.eval_shape(lambda: make_model(dit_config.load("imagenet256_s2"), jax.random.key(0)))
    rng = np.random.default_rng(0)
    tensors = {name: torch.tensor(0.02 * rng.normal(size=a.shape).astype(np.float32))
               for name, a in jax.eval_shape(convert.to_official, abstract).items()}
    tensors["pos_embed"] = torch.tensor(position_embedding(16, 384))
    torch.save({"ema": tensors}, tmp_path / "DiT-S-2-256x256.pt")
    convert.main([str(tmp_path / "DiT-S-2-256x256.pt"), str(tmp_path / "s2")])
    sample.main([str(tmp_path / "s2"), "--vae", str(stable_diffusion_vae[1]), "--classes", "golden retriever", "360", "--per-class", "1",
                 "--guidance", "4", "--cfg-channels", "3", "--steps", "5", "--out", str(tmp_path / "x.png")])
    picture = Image.open(tmp_path / "x.png")
    assert picture.height == 2 * 258 + 2 and np.asarray(picture).std() > 10
