"""The Diffusion Transformer of Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), Figure 3.

B batch, H and W height and width, C channels of the image, p patch side, T = (H / p) (W / p) tokens, D hidden size,
N heads, L depth, S tokens of the condition.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit.normalization import AdaLN, AdaLNZero, Modulation, layer_norm, modulate

PRESETS = {
    f"DiT-{size}/{patch_size}": dict(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
    for size, depth, hidden_size, num_heads in [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)]
    for patch_size in (8, 4, 2)
}

xavier = nnx.initializers.xavier_uniform()
normal_002 = nnx.initializers.normal(0.02)
zero_init = nnx.initializers.zeros


# Images and tokens


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """`[B, H, W, C]` to `[B, T, p p C]`, row by row; within a patch, rows, columns, channels."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // patch_size, patch_size, W // patch_size, patch_size, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, patch_size * patch_size * C)  # [B, T, p p C]


def unpatchify(x: jax.Array, patch_size: int) -> jax.Array:
    """The inverse of `patchify` for square images: `[B, T, p p C]` to `[B, H, W, C]`."""
    B, T, _ = x.shape
    side = int(T**0.5)
    x = x.reshape(B, side, side, patch_size, patch_size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, side * patch_size, side * patch_size, -1)  # [B, H, W, C]


def position_embedding(side: int, hidden_size: int) -> np.ndarray:
    """Fixed 2-D sin-cos positions `[1, T, D]`: the first half encodes the column, the second the row, each [sin | cos]."""
    frequencies = 10_000.0 ** (-np.arange(hidden_size // 4) / (hidden_size // 4))
    angles = np.arange(side)[:, None] * frequencies  # [side, D / 4]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, D / 2]
    column, row = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)  # [T, D / 2] each
    return np.concatenate([column, row], axis=1)[None].astype(np.float32)


def timestep_features(t: jax.Array, size: int = 256) -> jax.Array:
    """t `[B]`, the raw timestep, to `[B, size]`: [cos | sin] of t over geometrically growing periods up to 2 pi 10,000."""
    frequencies = (10_000.0 ** (-np.arange(size // 2) / (size // 2))).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


# The parts of a block


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of q `[B, T, N, D / N]` over k and v `[B, S, N, D / N]`; fused on GPU in bfloat16."""
    head_dim = q.shape[-1]
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # [B, N, T or S, D / N]: twice as fast on a CPU as heads behind time
    logits = jnp.einsum("bntd,bnsd->bnts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bnsd->bntd", weights, v).swapaxes(1, 2)


class SelfAttention(nnx.Module):
    """Multi-head attention of x `[B, T, D]` to itself; one fused matrix makes queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = nnx.Linear(hidden_size, 3 * hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(hidden_size, hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, T, D = x.shape
        q, k, v = jnp.unstack(self.qkv(x).reshape(B, T, 3, self.num_heads, -1), axis=2)  # [B, T, N, D / N] each
        return self.proj(attend(q, k, v).reshape(B, T, D))


class CrossAttention(nnx.Module):
    """Multi-head attention of x `[B, T, D]` to the condition c `[B, S, D]`."""

    def __init__(self, hidden_size: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.q = nnx.Linear(hidden_size, hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.kv = nnx.Linear(hidden_size, 2 * hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(hidden_size, hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        B, T, D = x.shape
        q = self.q(x).reshape(B, T, self.num_heads, -1)  # [B, T, N, D / N]
        k, v = jnp.unstack(self.kv(c).reshape(B, c.shape[1], 2, self.num_heads, -1), axis=2)  # [B, S, N, D / N] each
        return self.proj(attend(q, k, v).reshape(B, T, D))


class MLP(nnx.Module):
    """Two linear layers with a GELU (tanh form) between them, on each token."""

    def __init__(self, hidden_size: int, mlp_ratio: float, *, dtype, rngs: nnx.Rngs):
        self.up = nnx.Linear(hidden_size, int(hidden_size * mlp_ratio), kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(int(hidden_size * mlp_ratio), hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x), approximate=True))


# The four block designs of the paper: x [B, T, D] and the condition c to [B, T, D]


class AdaLNZeroBlock(nnx.Module):
    """adaLN-Zero: c `[B, 1 or T, D]` shifts, scales and gates; all three start at zero, so the block starts as the identity."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.modulation = AdaLNZero(hidden_size, num_branches=2, dtype=dtype, rngs=rngs)  # starts at zero
        self.attention = SelfAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(hidden_size, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        return self.modulation(x, c, self.attention, self.mlp)


class AdaLNBlock(nnx.Module):
    """adaLN: c `[B, 1 or T, D]` shifts and scales, without gates and without the zero."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.modulation = AdaLN(hidden_size, num_branches=2, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(hidden_size, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        return self.modulation(x, c, self.attention, self.mlp)


class CrossAttentionBlock(nnx.Module):
    """Cross-attention: after attending to itself, x attends to the sequence c `[B, S, D]` = (t, y)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.attention = SelfAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.cross_attention = CrossAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(hidden_size, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        x = x + self.attention(layer_norm(x).astype(x.dtype))
        x = x + self.cross_attention(layer_norm(x).astype(x.dtype), c)
        return x + self.mlp(layer_norm(x).astype(x.dtype))


class InContextBlock(nnx.Module):
    """In-context: a plain ViT block; t and y are tokens of x already, and c is not looked at."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.attention = SelfAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(hidden_size, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        x = x + self.attention(layer_norm(x).astype(x.dtype))
        return x + self.mlp(layer_norm(x).astype(x.dtype))


BLOCKS = {"adaln_zero": AdaLNZeroBlock, "adaln": AdaLNBlock, "cross_attention": CrossAttentionBlock, "in_context": InContextBlock}


# Before and after the blocks


class TimestepEmbedding(nnx.Module):
    """t `[B]` to `[B, D]`: sinusoids, then a two-layer MLP."""

    def __init__(self, hidden_size: int, *, dtype, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(256, hidden_size, kernel_init=normal_002, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden_size, hidden_size, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.fc2(nnx.silu(self.fc1(timestep_features(t))))


class MaskEmbedding(nnx.Module):
    """Labels `[B, H, W]` of a mask to one vector a token, `[B, T, D]`; a label that is no class, the null mask's, says nothing."""

    def __init__(self, mask_classes: int, patch_size: int, hidden_size: int, *, dtype, rngs: nnx.Rngs):
        self.mask_classes, self.patch_size = mask_classes, patch_size
        self.conv = nnx.Conv(mask_classes, 64, (3, 3), kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.linear = nnx.Linear(patch_size * patch_size * 64, hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, mask: jax.Array) -> jax.Array:
        features = nnx.silu(self.conv(jax.nn.one_hot(mask, self.mask_classes)))  # [B, H, W, 64]
        return self.linear(patchify(features, self.patch_size))


class FinalLayer(nnx.Module):
    """x `[B, T, D]` to `[B, T, p p C]`: (adaptive) layer norm, then a linear layer that starts at zero. Float32 out."""

    def __init__(self, hidden_size: int, out_size: int, adaptive: bool, *, dtype, rngs: nnx.Rngs):
        if adaptive:
            self.modulation = Modulation(hidden_size, 2, dtype=dtype, rngs=rngs)  # starts at zero
        self.adaptive = adaptive
        self.linear = nnx.Linear(hidden_size, out_size, kernel_init=zero_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        x = modulate(x, *self.modulation(nnx.silu(c))) if self.adaptive else layer_norm(x).astype(x.dtype)
        return self.linear(x).astype(jnp.float32)


class DiT(nnx.Module):
    """The Diffusion Transformer.

    `model(x, t, y)`: x `[B, H, W, C]`, t `[B]` (0 .. 999, may be fractional), y `[B]` int (num_classes is the null class) to
    `[B, H, W, 2C]` float32 (noise, then variance logits), or `[B, H, W, C]` without `learn_sigma`. With `mask_classes`, y is a pair: the
    labels, and masks `[B, H, W]` int (mask_classes is the null mask), which say what the condition is at each token, as SPADE does.
    Parameters are float32; `dtype` is the type of the computation.
    """

    def __init__(self, *, input_size: int, patch_size: int, in_channels: int, hidden_size: int, depth: int, num_heads: int,
                 num_classes: int, mlp_ratio: float = 4.0, learn_sigma: bool = True, conditioning: str = "adaln_zero",
                 dtype=jnp.float32, remat: bool = False, mask_classes: int = 0, rngs: nnx.Rngs):
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads, self.mlp_ratio = hidden_size, depth, num_heads, mlp_ratio
        self.num_classes, self.learn_sigma, self.conditioning = num_classes, learn_sigma, conditioning
        self.dtype, self.remat, self.mask_classes = dtype, remat, mask_classes
        self.adaptive = conditioning in ("adaln_zero", "adaln")
        out_size = patch_size * patch_size * in_channels * (1 + learn_sigma)

        self.patch_embed = nnx.Linear(patch_size * patch_size * in_channels, hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.timestep_embed = TimestepEmbedding(hidden_size, dtype=dtype, rngs=rngs)
        self.label_embed = nnx.Embed(num_classes + 1, hidden_size, embedding_init=normal_002, dtype=dtype, rngs=rngs)
        self.mask_embed = MaskEmbedding(mask_classes, patch_size, hidden_size, dtype=dtype, rngs=rngs) if mask_classes else None
        # vmap over the constructor of one block: the leaves carry a layer axis, and the fans of xavier do not see it
        self.blocks = jax.vmap(lambda r: BLOCKS[conditioning](hidden_size, num_heads, mlp_ratio, dtype=dtype, rngs=r))(rngs.split(depth))
        self.final = FinalLayer(hidden_size, out_size, self.adaptive, dtype=dtype, rngs=rngs)

    def condition(self, t: jax.Array, y) -> jax.Array:
        """t `[B]` and y to c: their sum `[B, 1, D]`, or `[B, T, D]` with masks, for adaLN; the sequence `[B, 2, D]` for the others."""
        label, mask = y if self.mask_classes else (y, None)
        t, label = self.timestep_embed(t)[:, None], self.label_embed(label)[:, None]  # [B, 1, D] each
        if not self.adaptive:
            return jnp.concatenate([t, label], axis=1)
        return t + label if mask is None else t + label + self.mask_embed(mask)

    def __call__(self, x: jax.Array, t: jax.Array, y) -> jax.Array:
        positions = position_embedding(self.input_size // self.patch_size, self.hidden_size)
        x = self.patch_embed(patchify(x, self.patch_size)) + positions.astype(self.dtype)  # [B, T, D]
        c = self.condition(t, y)  # [B, 1, D], [B, T, D] or [B, 2, D]
        num_patches = x.shape[1]
        if self.conditioning == "in_context":
            x = jnp.concatenate([x, c], axis=1)  # [B, T + 2, D]
        apply = jax.checkpoint(lambda block, x: block(x, c), prevent_cse=False) if self.remat else lambda block, x: block(x, c)
        x, _ = jax.lax.scan(lambda x, block: (apply(block, x), None), x, self.blocks)
        return unpatchify(self.final(x[:, :num_patches], c), self.patch_size)  # [B, H, W, 2C] or [B, H, W, C]


# Costs


def count_parameters(module: nnx.Module) -> int:
    """Trainable parameters, of a model, of a layer, or of its `jax.eval_shape`: running statistics are none."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def multiply_adds(model: DiT) -> int:
    """Multiply-adds of one image's forward pass, matrix products only: the paper's "Gflops", times 1e9.

    FLOPs are twice as many, and a training step costs three forward passes.
    """
    D, L = model.hidden_size, model.depth
    patches = (model.input_size // model.patch_size) ** 2
    pixels = model.patch_size**2 * model.in_channels
    tokens = patches + 2 * (model.conditioning == "in_context")
    self_attention = 4 * tokens * D * D + 2 * tokens * tokens * D
    mlp = 2 * tokens * D * int(D * model.mlp_ratio)
    places = patches if model.mask_classes else 1  # that have a condition of their own
    mask = patches * model.patch_size**2 * (9 * model.mask_classes * 64 + 64 * D) if model.mask_classes else 0
    conditioning = {"adaln_zero": 6 * places * D * D, "adaln": 4 * places * D * D, "in_context": 0,
                    "cross_attention": 2 * tokens * D * D + 4 * D * D + 4 * tokens * D}[model.conditioning]
    final = 2 * places * D * D * model.adaptive + patches * D * pixels * (1 + model.learn_sigma)
    return patches * pixels * D + 256 * D + D * D + mask + L * (self_attention + mlp + conditioning) + final
