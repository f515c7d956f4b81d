"""The network, written again in torch.nn.functional, on our weights; AdamW; diffusers' schedulers.

`make parity`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, inputs, tiny_model

from dit import sampling
from dit.config import Optim
from dit.flow import Flow
from dit.model import DiT, position_embedding
from dit.state import learning_rate, make_optimizer

pytestmark = pytest.mark.parity


def by_name(model: DiT) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {
        name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def torch_weights(model: DiT) -> dict:
    import torch

    arrays = {name: np.array(leaf) for name, leaf in by_name(model).items()}
    return {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}


def torch_forward(weights: dict, model: DiT, x, t, y):
    """x `[B, C, H, W]` to `[B, 2C, H, W]`: patches by convolution and fold, as PyTorch has them."""
    import torch
    import torch.nn.functional as F

    B, C, side, _ = x.shape
    p, D, N = model.patch_size, model.hidden_size, model.num_heads

    def linear(name: str, a, layer: int | None = None):
        kernel, bias = weights[name + ".kernel"], weights[name + ".bias"]
        if layer is not None:
            kernel, bias = kernel[layer], bias[layer]
        return F.linear(a, kernel.T, bias)

    def modulate(a, shift, scale):
        return F.layer_norm(a, (D,), eps=1e-6) * (1 + scale) + shift

    kernel = weights["patch_embed.kernel"].reshape(p, p, C, D).permute(3, 2, 0, 1)
    patches = F.conv2d(x, kernel, weights["patch_embed.bias"], stride=p)
    h = patches.flatten(2).transpose(1, 2)  # [B, T, D]
    h = h + torch.tensor(position_embedding(side // p, D))
    T = h.shape[1]

    frequencies = torch.exp(-np.log(10_000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    t_embedding = linear("timestep_embed.fc2", F.silu(linear("timestep_embed.fc1", features)))
    c = F.silu(t_embedding + weights["label_embed.embedding"][y])

    for i in range(model.depth):
        vectors = linear("blocks.modulation.linear", c, i)[:, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors.chunk(6, dim=-1)
        qkv = linear("blocks.attention.qkv", modulate(h, shift_1, scale_1), i)
        q, k, v = qkv.reshape(B, T, 3, N, -1).permute(2, 0, 3, 1, 4)  # [B, N, T, D / N] each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
        h = h + gate_1 * linear("blocks.attention.proj", attended, i)
        up = linear("blocks.mlp.up", modulate(h, shift_2, scale_2), i)
        h = h + gate_2 * linear("blocks.mlp.down", F.gelu(up, approximate="tanh"), i)

    shift, scale = linear("final.modulation.linear", c)[:, None].chunk(2, dim=-1)
    out = linear("final.linear", modulate(h, shift, scale))  # [B, T, p p 2C]
    out = out.reshape(B, T, p * p, 2 * C).permute(0, 3, 2, 1)  # [B, 2C, p p, T]
    return F.fold(out.reshape(B, 2 * C * p * p, T), side, p, stride=p)  # [B, 2C, H, W]


def relative(ours: jax.Array, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def channels_last(images) -> np.ndarray:
    return images.detach().permute(0, 2, 3, 1).numpy()


def test_outputs_and_gradients_equal_torchs():
    import torch

    sizes = dict(hidden_size=52, num_heads=13, depth=3, in_channels=5, input_size=9)
    model = awaken(tiny_model(**sizes), scale=0.05)
    x, t, y = inputs(model)
    weights = torch_weights(model)
    torch_x = torch.tensor(np.array(x)).permute(0, 3, 1, 2).requires_grad_()
    output = torch_forward(
        weights, model, torch_x, torch.tensor(np.array(t)), torch.tensor(np.array(y))
    )
    assert relative(model(x, t, y), channels_last(output)) < 1e-5

    def loss(model: DiT, x: jax.Array) -> jax.Array:
        return jnp.square(model(x, t, y)).sum()

    output.square().sum().backward()
    grads, x_grad = jax.grad(loss, argnums=(0, 1))(model, x)
    assert relative(x_grad, channels_last(torch_x.grad)) < 1e-4
    ours = by_name(grads)
    assert ours.keys() == weights.keys()
    for name, leaf in ours.items():
        assert relative(leaf, weights[name].grad.numpy()) < 1e-4, name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs(weight_decay):
    import torch

    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 5)).astype(np.float32)
    grads = rng.normal(size=(7, 3, 5)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    options = dict(lr=1e-2, betas=(0.9, 0.999), weight_decay=weight_decay)
    torch_optimizer = torch.optim.AdamW([theirs], **options)
    config = Optim(learning_rate=1e-2, weight_decay=weight_decay)
    optimizer = make_optimizer(config, learning_rate(config, len(grads)))
    params = jnp.asarray(start)
    state = optimizer.init(params)
    for grad in grads:
        theirs.grad = torch.tensor(grad)
        torch_optimizer.step()
        updates, state = optimizer.update(jnp.asarray(grad), state, params)
        params = params + updates
    assert relative(params, theirs.detach().numpy()) < 1e-5


@pytest.mark.parametrize("ours", [sampling.euler, sampling.heun])
def test_flow_samplers_equal_diffusers(ours):
    """Path, times, the network's scale of them, and steps; the network is sin(x + t / 1000)."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    flow = Flow("v", "uniform", 0.0, 1.0)
    keys, shape, steps = sampling.sample_keys(0, jnp.arange(3)), (2, 5, 1), 7
    start = torch.tensor(np.array(sampling.sample_noise(keys, 1, shape)))
    if ours is sampling.euler:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    else:  # its sigmas end at 1 / num_train_timesteps, before 0
        scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=steps)
        scheduler.set_timesteps(steps)
    scale = 1000 / scheduler.config.num_train_timesteps
    x, times = start, []
    for t in scheduler.timesteps:
        times.append(float(scale * t))
        x = scheduler.step(torch.sin(x + scale * t / 1000), t, x).prev_sample

    seen = []

    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: seen.append(float(t)), t[0], ordered=True)
        return jnp.sin(x + t.reshape(-1, 1, 1, 1) / 1000)

    sample = ours(flow, network, keys, shape, steps)
    np.testing.assert_allclose(sample, x.numpy(), atol=1e-5)
    np.testing.assert_allclose(seen, times, rtol=1e-6)

    scheduler = FlowMatchEulerDiscreteScheduler()
    image, t = jnp.tanh(sample), scheduler.timesteps[[100, 500, 900]]
    noised = scheduler.scale_noise(torch.tensor(np.array(image)), t, start)
    xt = flow.q_sample(image, jnp.asarray(t.numpy()) / 1000, jnp.asarray(start.numpy()))
    np.testing.assert_allclose(xt, noised.numpy(), atol=1e-6)
