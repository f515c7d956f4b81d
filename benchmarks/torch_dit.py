"""A DiT's training step in PyTorch, for benchmarks/train_step.py to time beside ours.

The step, around any DiT, has our hybrid loss, AdamW, clip and moving average, bfloat16 by autocast,
and PyTorch's fused optimizer. It leaves out flips, the sampling of latents, min-SNR weights and the
schedule of the learning rate, which cost next to nothing. The equations are those of dit/ddpm.py.
The DiT here is written from the paper (arXiv 2212.09748), with our sizes and initialisation and
PyTorch's fused attention.

B batch, C channels, H and W height and width, p side of a patch, T tokens, D hidden size, N heads.
"""

import copy
import importlib
import itertools
import math
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.config import Config, require
from dit.model import TIMESTEP_FEATURES, position_embedding
from dit.state import make_objective

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Tables = dict[str, Tensor]


def linear(in_size: int, out_size: int, init: Callable = nn.init.xavier_uniform_) -> nn.Linear:
    layer = nn.Linear(in_size, out_size)
    init(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def normal_002(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=0.02)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        width = int(hidden_size * mlp_ratio)
        self.num_heads = num_heads
        self.modulation = linear(hidden_size, 6 * hidden_size, nn.init.zeros_)
        self.qkv = linear(hidden_size, 3 * hidden_size)
        self.proj = linear(hidden_size, hidden_size)
        self.up = linear(hidden_size, width)
        self.down = linear(width, hidden_size)

    def attention(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, N, T, D / N] each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x `[B, T, D]` and c `[B, 1, D]` to `[B, T, D]`."""
        vectors = self.modulation(F.silu(c))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors.chunk(6, dim=-1)
        x = x + gate_1 * self.attention(modulate(x, shift_1, scale_1))
        x = x + gate_2 * self.mlp(modulate(x, shift_2, scale_2))
        return x


class DiT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        side, _, channels = config.input_shape
        model, D = config.model, config.model.hidden_size
        self.patch_size = model.patch_size
        patch_values = model.patch_size**2 * channels
        self.patch_embed = linear(patch_values, D)
        self.timestep_fc1 = linear(TIMESTEP_FEATURES, D, normal_002)
        self.timestep_fc2 = linear(D, D, normal_002)
        self.label_embed = nn.Embedding(config.data.num_classes + 1, D)
        normal_002(self.label_embed.weight)
        blocks = [Block(D, model.num_heads, model.mlp_ratio) for _ in range(model.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_modulation = linear(D, 2 * D, nn.init.zeros_)
        self.final = linear(D, 2 * patch_values, nn.init.zeros_)

        half = TIMESTEP_FEATURES // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies)
        positions = torch.tensor(position_embedding(side // model.patch_size, D))
        self.register_buffer("positions", positions)  # [1, T, D]

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """`[B, 1, D]`"""
        angles = t[:, None] * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        t = self.timestep_fc2(F.silu(self.timestep_fc1(features)))
        return (t + self.label_embed(y))[:, None]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x `[B, C, H, W]` to the noise and the variance logits, `[B, 2C, H, W]`."""
        B, C, H, W = x.shape
        p = self.patch_size
        x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
        x = self.patch_embed(x.reshape(B, -1, p * p * C)) + self.positions  # [B, T, D]
        c = self.condition(t, y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(F.silu(c)).chunk(2, dim=-1)
        x = self.final(modulate(x, shift, scale))  # [B, T, p p 2C]
        x = x.reshape(B, H // p, W // p, p, p, 2 * C).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, 2 * C, H, W)


# Its peers


def stub_torchvision() -> None:
    """Lets diffusers be imported beside a CPU build of torch.

    torchvision registers operators which that lacks, and which nothing needs here.
    """
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))


def import_peer(peer: str) -> Callable[[Config], nn.Module]:
    """What makes the model of a config's sizes: x `[B, C, H, W]`, t and y to `[B, 2C, H, W]`.

    `peer` is torch_dit, diffusers, or FILE.py:CLASS; without a class it is DiT. Raises InputError.
    """
    if peer == "torch_dit":
        return DiT
    if peer == "diffusers":
        stub_torchvision()
        from diffusers import DiTTransformer2DModel

        return partial(make_diffusers, DiTTransformer2DModel)
    path, _, name = peer.partition(":")
    sys.path.insert(0, str(Path(path).parent))  # the file may import its neighbours
    found = vars(importlib.import_module(Path(path).stem))
    name = name or "DiT"
    require(name in found, "--peer", peer, f"FILE.py:CLASS, and {name} a class of {path}")
    return partial(make_published, found[name])


def make_diffusers(kind: Callable[..., nn.Module], config: Config) -> nn.Module:
    (side, _, channels), sizes = config.input_shape, config.model
    model = kind(
        num_attention_heads=sizes.num_heads,
        attention_head_dim=sizes.hidden_size // sizes.num_heads,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=sizes.depth,
        sample_size=side,
        patch_size=sizes.patch_size,
        num_embeds_ada_norm=config.data.num_classes,
        norm_eps=1e-6,
    )
    model.register_forward_hook(lambda module, inputs, output: output.sample)
    return model


def make_published(kind: Callable[..., nn.Module], config: Config) -> nn.Module:
    """By the arguments of the paper's own code."""
    (side, _, channels), sizes = config.input_shape, config.model
    return kind(
        input_size=side,
        patch_size=sizes.patch_size,
        in_channels=channels,
        hidden_size=sizes.hidden_size,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_ratio=sizes.mlp_ratio,
        class_dropout_prob=config.objective.label_dropout,
        num_classes=config.data.num_classes,
        learn_sigma=True,
    )


# The training step


def make_tables(config: Config, device: str) -> Tables:
    ddpm = make_objective(config)
    tables = {
        "signal_scale": np.sqrt(ddpm.alphas_cumprod),
        "noise_scale": np.sqrt(1 - ddpm.alphas_cumprod),
        "mean_x0": ddpm.posterior_mean_x0,
        "mean_xt": ddpm.posterior_mean_xt,
        "smallest": ddpm.posterior_log_variance,
        "largest": np.log(ddpm.betas),
    }
    return {name: torch.tensor(table).float().to(device) for name, table in tables.items()}


def loss(model: Callable, x: Tensor, y: Tensor, tables: Tables, dtype: torch.dtype) -> Tensor:
    """(6) of x `[B, C, H, W]` and its labels `[B]`."""
    t = torch.randint(0, len(tables["largest"]), (len(x),), device=x.device)
    at = {name: table[t].view(-1, 1, 1, 1) for name, table in tables.items()}
    noise = torch.randn_like(x)
    xt = at["signal_scale"] * x + at["noise_scale"] * noise  # (1)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        output = model(xt, t, y)
    eps, v = output.float().chunk(2, dim=1)
    mse = F.mse_loss(eps, noise)

    pred_x0 = (xt - at["noise_scale"] * eps.detach()) / at["signal_scale"]  # (3)
    mean = at["mean_x0"] * pred_x0 + at["mean_xt"] * xt  # (2)
    true_mean = at["mean_x0"] * x + at["mean_xt"] * xt
    fraction = (v + 1) / 2
    log_variance = fraction * at["largest"] + (1 - fraction) * at["smallest"]  # (4)
    log_ratio = at["smallest"] - log_variance
    distance = torch.square(true_mean - mean) * torch.exp(-log_variance)
    kl = 0.5 * (torch.exp(log_ratio) - log_ratio - 1 + distance)
    nats = torch.where(t.view(-1, 1, 1, 1) == 0, negative_log_likelihood(x, mean, log_variance), kl)
    return mse + nats.mean() / math.log(2)  # (6)


def negative_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """That of 8-bit pixels x in [-1, 1], in nats."""
    precision = torch.exp(-0.5 * log_variance)
    above = torch.special.ndtr((x + 1 / 255 - mean) * precision)
    below = torch.special.ndtr((x - 1 / 255 - mean) * precision)
    above = torch.where(x > 0.999, 1.0, above)
    below = torch.where(x < -0.999, 0.0, below)
    return -torch.log(torch.clamp(above - below, min=1e-12))


def make_step(
    config: Config, make_model: Callable[[Config], nn.Module], device: str, compiled: bool
) -> Callable[[], Tensor]:
    """Each call takes one step on the same random batch and returns its loss.

    `compiled` passes the blocks through torch.compile: one compilation serves all of them.
    """
    torch.manual_seed(config.train.seed)
    optim, batch_size = config.optim, config.train.batch_size
    side, _, channels = config.input_shape
    dtype = TYPES[config.train.dtype]
    model = make_model(config).to(device).eval()  # the step drops labels, and no model by itself
    if compiled:
        stacks = [child for child in model.children() if isinstance(child, nn.ModuleList)]
        for block in itertools.chain(*stacks):
            block.compile()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = copy.deepcopy([parameter.detach() for parameter in parameters])
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(
        parameters, optim.learning_rate, betas, weight_decay=optim.weight_decay, fused=True
    )
    tables = make_tables(config, device)
    x = torch.rand(batch_size, channels, side, side, device=device) * 2 - 1
    labels = torch.randint(0, config.data.num_classes, (batch_size,), device=device)

    def step() -> Tensor:
        dropped = torch.rand(batch_size, device=device) < config.objective.label_dropout
        y = torch.where(dropped, config.data.num_classes, labels)
        value = loss(model, x, y, tables, dtype)
        value.backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if optim.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, optim.grad_clip, norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1 - optim.ema_decay)
        return value.detach()

    return step


def product_rate(size: int, dtype: str, repeats: int) -> float:
    """FLOP/s of products of square matrices, as machine.py measures JAX's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(size, size, device=device).to(TYPES[dtype]) * size**-0.5
    x = matrix @ matrix
    x[0, 0].item()  # waits
    start = time.perf_counter()
    for _ in range(repeats):
        x = x @ matrix
    x[0, 0].item()
    return 2 * size**3 * repeats / (time.perf_counter() - start)
