"""Held against PyTorch: the network written a second time in torch.nn.functional, on our weights, and its optimizer. `make parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, inputs, tiny_model

from dit.config import Optim
from dit.model import position_embedding
from dit.state import make_optimizer

pytestmark = pytest.mark.parity


def torch_forward(w, model, x, t, y):
    """x `[B, C, H, W]`: the patch embedding and the unpatchify as convolutions, as PyTorch implementations have them."""
    import torch
    import torch.nn.functional as F

    p, D, C = model.patch_size, model.hidden_size, model.in_channels
    linear = lambda name, a, i=None: F.linear(a, (w[name + ".kernel"] if i is None else w[name + ".kernel"][i]).T,  # noqa: E731
                                              w[name + ".bias"] if i is None else w[name + ".bias"][i])
    adaptive = lambda a, shift, scale: F.layer_norm(a, (D,), eps=1e-6) * (1 + scale) + shift  # noqa: E731

    kernel = w["patch_embed.kernel"].reshape(p, p, C, D).permute(3, 2, 0, 1)
    h = F.conv2d(x, kernel, w["patch_embed.bias"], stride=p).flatten(2).transpose(1, 2)  # [B, T, D]
    h = h + torch.tensor(position_embedding(model.input_size // p, D))
    frequencies = torch.exp(-np.log(10_000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    c = linear("timestep_embed.fc2", F.silu(linear("timestep_embed.fc1", features))) + w["label_embed.embedding"][y]
    for i in range(model.depth):
        b1, s1, g1, b2, s2, g2 = linear("blocks.modulation.linear", F.silu(c), i)[:, None].chunk(6, dim=-1)
        B, T, _ = h.shape
        q, k, v = linear("blocks.attention.qkv", adaptive(h, b1, s1), i).reshape(B, T, 3, model.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
        h = h + g1 * linear("blocks.attention.proj", attended, i)
        h = h + g2 * linear("blocks.mlp.down", F.gelu(linear("blocks.mlp.up", adaptive(h, b2, s2), i), approximate="tanh"), i)
    shift, scale = linear("final.modulation.linear", F.silu(c))[:, None].chunk(2, dim=-1)
    out = linear("final.linear", adaptive(h, shift, scale))  # [B, T, p p 2C]
    out = out.reshape(B, T, p * p, 2 * C).permute(0, 3, 2, 1).reshape(B, 2 * C * p * p, T)
    return F.fold(out, model.input_size, p, stride=p)  # [B, 2C, H, W]


def by_name(model) -> dict:
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def torch_weights(model):
    import torch

    return {name: torch.tensor(np.asarray(leaf), requires_grad=True) for name, leaf in by_name(model).items()}


def relative(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def test_outputs_and_gradients_equal_torchs():
    import torch

    model = awaken(tiny_model(hidden_size=52, num_heads=13, depth=3, in_channels=5, input_size=9), scale=0.05)
    x, t, y = inputs(model)
    weights = torch_weights(model)
    tx = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
    theirs = torch_forward(weights, model, tx, torch.tensor(np.asarray(t)), torch.tensor(np.asarray(y)))
    assert relative(model(x, t, y), theirs.detach().permute(0, 2, 3, 1).numpy()) < 1e-5

    theirs.square().sum().backward()
    grads, x_grad = jax.grad(lambda m, x: jnp.square(m(x, t, y)).sum(), argnums=(0, 1))(model, x)
    assert relative(x_grad, tx.grad.permute(0, 2, 3, 1).numpy()) < 1e-4
    ours = by_name(grads)
    assert ours.keys() == weights.keys()
    for name, leaf in ours.items():
        assert relative(leaf, weights[name].grad.numpy()) < 1e-4, name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs(weight_decay):
    import torch

    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(7, 3, 5)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), weight_decay=weight_decay)
    tx, params = make_optimizer(Optim(learning_rate=1e-2, weight_decay=weight_decay), 7), jnp.asarray(start)
    state = tx.init(params)
    for grad in grads:
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        updates, state = tx.update(jnp.asarray(grad), state, params)
        params = params + updates
    assert relative(params, theirs.detach().numpy()) < 1e-5
