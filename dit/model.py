"""The Diffusion Transformer of Peebles & Xie (arXiv 2212.09748), in the order of Figure 3.

B batch, H and W height and width, C channels of the image, p side of a patch, T = (H / p) (W / p)
tokens, D hidden size, N heads, L depth, S tokens of a sequence that is attended to.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit.config import (
    PRESETS as PRESETS,
)  # the paper's twelve sizes: DiT(**PRESETS["DiT-XL/2"], ...)
from dit.config import require
from dit.linear import Linear, multiply
from dit.normalization import Modulation, layer_norm, modulate, xavier, zero_init
from dit.sharding import gather, has_cudnn_attention, is_one_cpu

normal_002 = nnx.initializers.normal(0.02)

MASK_FEATURES = 64  # channels of the convolution that embeds a mask
TIMESTEP_FEATURES = 256
SHALLOW = 12  # blocks that a CPU's program may hold one by one, rather than as a loop


# Images and tokens


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """`[B, H, W, C]` to `[B, T, p p C]`, row by row; within a patch rows, columns, channels."""
    B, H, W, C = x.shape
    p = patch_size
    x = x.reshape(B, H // p, p, W // p, p, C)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, H / p, W / p, p, p, C]
    return x.reshape(B, -1, p * p * C)  # [B, T, p p C]


def unpatchify(x: jax.Array, patch_size: int) -> jax.Array:
    """The inverse of `patchify` for square images: `[B, T, p p C]` to `[B, H, W, C]`."""
    B, T, _ = x.shape
    p, side = patch_size, int(T**0.5)
    x = x.reshape(B, side, side, p, p, -1)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, H / p, p, W / p, p, C]
    return x.reshape(B, side * p, side * p, -1)  # [B, H, W, C]


def position_embedding(side: int, hidden_size: int) -> np.ndarray:
    """Fixed 2-D sin-cos positions, float32 `[1, T, D]`.

    The first half of the channels encodes the column, the second the row, each as [sin | cos].
    """
    quarter = hidden_size // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    angles = np.arange(side)[:, None] * frequencies  # [side, D / 4]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, D / 2]
    column = np.tile(line, (side, 1))  # [T, D / 2]
    row = np.repeat(line, side, axis=0)  # [T, D / 2]
    return np.concatenate([column, row], axis=1)[None].astype(np.float32)


def timestep_features(t: jax.Array, size: int = TIMESTEP_FEATURES) -> jax.Array:
    """t `[B]`, not scaled, to `[B, size]`: [cos | sin] over periods from 2 pi to 2 pi 10,000."""
    half = size // 2
    frequencies = (10_000.0 ** (-np.arange(half) / half)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]  # [B, size / 2]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


# The condition


class TimestepEmbedding(nnx.Module):
    """t `[B]` to `[B, D]`: sinusoids, then a two-layer MLP."""

    def __init__(self, hidden_size: int, *, rngs: nnx.Rngs):
        options = dict(kernel_init=normal_002, rngs=rngs)
        self.fc1 = Linear(TIMESTEP_FEATURES, hidden_size, **options)
        self.fc2 = Linear(hidden_size, hidden_size, **options)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.fc2(nnx.silu(self.fc1(timestep_features(t))))


class MaskEmbedding(nnx.Module):
    """A mask of labels `[B, H, W]` to one vector a token, `[B, T, D]`.

    A label that is none of the classes, such as the null mask's, adds nothing.
    """

    def __init__(self, mask_classes: int, patch_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.mask_classes = mask_classes
        self.patch_size = patch_size
        options = dict(kernel_init=xavier, rngs=rngs)
        self.conv = nnx.Conv(mask_classes, MASK_FEATURES, (3, 3), precision="highest", **options)
        self.linear = Linear(patch_size**2 * MASK_FEATURES, hidden_size, **options)

    def __call__(self, mask: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(mask, self.mask_classes)  # [B, H, W, mask_classes]
        features = nnx.silu(self.conv(one_hot))  # [B, H, W, MASK_FEATURES]
        return self.linear(patchify(features, self.patch_size))


# The parts of a block


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of q `[B, T, N, D / N]` over k and v `[B, S, N, D / N]`.

    Fused by cuDNN in bfloat16 where the GPU can; jax refuses its derivative for odd T or S.
    Elsewhere heads are moved in front of time, which is twice as fast on a CPU as behind it.
    """
    head_dim = q.shape[-1]
    is_even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fits_cudnn = q.dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128 and is_even
    if fits_cudnn and has_cudnn_attention():
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    B, T, N, _ = q.shape
    # [B N, T or S, D / N]. Over two axes XLA would undo the swap, and a CPU compute in float32.
    q, k, v = (a.swapaxes(1, 2).reshape(B * N, -1, head_dim) for a in (q, k, v))
    logits = multiply("btd,bsd->bts", q, k, q.dtype, jnp.float32)
    weights = jax.nn.softmax(logits * head_dim**-0.5, axis=-1)
    out = multiply("bts,bsd->btd", weights, v, q.dtype, q.dtype)
    return out.reshape(B, N, T, head_dim).swapaxes(1, 2)


class SelfAttention(nnx.Module):
    """Multi-head attention of x `[B, T, D]` to itself.

    One fused matrix makes queries, keys and values, so that xavier sees its fan of D and 3 D.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        options = dict(kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.qkv = Linear(hidden_size, 3 * hidden_size, **options)
        self.proj = Linear(hidden_size, hidden_size, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, -1)
        q, k, v = jnp.unstack(qkv, axis=2)  # [B, T, N, D / N] each
        return self.proj(attend(q, k, v).reshape(B, T, D))


class CrossAttention(nnx.Module):
    """Multi-head attention of x `[B, T, D]` to the condition c `[B, S, D]`."""

    def __init__(self, hidden_size: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        options = dict(kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.q = Linear(hidden_size, hidden_size, **options)
        self.kv = Linear(hidden_size, 2 * hidden_size, **options)
        self.proj = Linear(hidden_size, hidden_size, **options)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        (B, T, D), S = x.shape, c.shape[1]
        q = self.q(x).reshape(B, T, self.num_heads, -1)  # [B, T, N, D / N]
        kv = self.kv(c).reshape(B, S, 2, self.num_heads, -1)
        k, v = jnp.unstack(kv, axis=2)  # [B, S, N, D / N] each
        return self.proj(attend(q, k, v).reshape(B, T, D))


@partial(jax.checkpoint, prevent_cse=False)
def gelu(x: jax.Array) -> jax.Array:
    """GELU, tanh form, in float32 whatever the type of x, all that is kept for its derivative."""
    return nnx.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class MLP(nnx.Module):
    """Two linear layers with a GELU (tanh form) between them, on each token."""

    def __init__(self, hidden_size: int, mlp_ratio: float, *, dtype, rngs: nnx.Rngs):
        width = int(hidden_size * mlp_ratio)
        options = dict(kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.up = Linear(hidden_size, width, **options)
        self.down = Linear(width, hidden_size, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(gelu(self.up(x)))


# The four block designs of the paper: x [B, T, D] and the condition c to [B, T, D]. Where the block
# is `adaptive`, c is a vector of the image or of each token, elsewhere the sequence of t and y.


class AdaLNZeroBlock(nnx.Module):
    """adaLN-Zero: c `[B, 1 or T, D]` shifts, scales and gates, all from zero: x comes out as x."""

    adaptive = True

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype, rngs):
        self.modulation = Modulation(hidden_size, 6, kernel_init=zero_init, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(hidden_size, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(nnx.silu(c))
        x = x + gate_1 * self.attention(modulate(x, shift_1, scale_1))
        x = x + gate_2 * self.mlp(modulate(x, shift_2, scale_2))
        return x


class AdaLNBlock(nnx.Module):
    """adaLN: c `[B, 1 or T, D]` shifts and scales; there are no gates and no zeros."""

    adaptive = True

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype, rngs):
        self.modulation = Modulation(hidden_size, 4, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(hidden_size, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift_1, scale_1, shift_2, scale_2 = self.modulation(nnx.silu(c))
        x = x + self.attention(modulate(x, shift_1, scale_1))
        x = x + self.mlp(modulate(x, shift_2, scale_2))
        return x


class CrossAttentionBlock(nnx.Module):
    """Cross-attention: after itself, x attends to the sequence c `[B, 2, D]` of t and y."""

    adaptive = False

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype, rngs):
        self.attention = SelfAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.cross_attention = CrossAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(hidden_size, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        x = x + self.attention(layer_norm(x))
        x = x + self.cross_attention(layer_norm(x), c)
        x = x + self.mlp(layer_norm(x))
        return x


class InContextBlock(nnx.Module):
    """In-context: a plain ViT block. t and y are tokens of x, and c is not used."""

    adaptive = False

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype, rngs):
        self.attention = SelfAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(hidden_size, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        x = x + self.attention(layer_norm(x))
        x = x + self.mlp(layer_norm(x))
        return x


BLOCKS = {
    "adaln_zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross_attention": CrossAttentionBlock,
    "in_context": InContextBlock,
}


def check_block(conditioning: str, mask_classes: int) -> None:
    """Raises InputError for a name that is none of BLOCKS', or a block that takes no mask."""
    one = f"one of {', '.join(BLOCKS)}"
    require(conditioning in BLOCKS, "model.conditioning", conditioning, one)
    fits = BLOCKS[conditioning].adaptive or mask_classes == 0
    uniform = f"0 with model.conditioning = {conditioning!r}, which cannot vary in space"
    require(fits, "data.mask_classes", mask_classes, uniform)


# Behind the blocks


class FinalLayer(nnx.Module):
    """x `[B, T, D]` to `[B, T, p p C]`: layer norm, then a linear layer of zeros.

    In the adaptive designs c shifts and scales the layer norm, from zero.
    """

    def __init__(self, hidden_size: int, out_size: int, adaptive: bool, *, rngs: nnx.Rngs):
        self.adaptive = adaptive
        options = dict(kernel_init=zero_init, rngs=rngs)
        if adaptive:
            self.modulation = Modulation(hidden_size, 2, **options)
        self.linear = Linear(hidden_size, out_size, **options)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        if self.adaptive:
            shift, scale = self.modulation(nnx.silu(c))
            x = modulate(x, shift, scale)
        else:
            x = layer_norm(x)
        return self.linear(x)


# What the backward pass keeps of a block beside its input, where it does not keep all it needs:
# the products of matrices, or nothing. The rest is computed again.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class DiT(nnx.Module):
    """The Diffusion Transformer.

    `model(x, t, y, mask=None)`: x `[B, H, W, C]`; t `[B]`, or `[1]` for all of x, 0 .. 1000, may be
    fractional; y `[B]` int, `num_classes` is the null class, or weights of the classes to mix,
    `[B, num_classes + 1]` float; with `mask_classes`, mask `[B, H, W]` int, `mask_classes` is the
    null mask. Returns float32 `[B, H, W, 2C]`, the noise and then the variance logits, or
    `[B, H, W, C]` without `learn_sigma`: the noise, or what flow predicts. `dtype` is the type of
    the products inside the blocks; the residual stream, norms, GELU and softmax are float32, as is
    all before and behind the blocks.
    In training, `augment=`, `[B, augment_size]`, tells how images were augmented; none is the same
    as zeros.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        conditioning: str = "adaln_zero",
        mask_classes: int = 0,
        augment_size: int = 0,
        dtype=jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        check_block(conditioning, mask_classes)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.mlp_ratio = mlp_ratio
        self.learn_sigma = learn_sigma
        self.conditioning = conditioning
        self.mask_classes = mask_classes
        self.augment_size = augment_size
        self.dtype = dtype
        self.remat = remat

        patch_values = patch_size**2 * in_channels
        self.patch_embed = Linear(patch_values, hidden_size, kernel_init=xavier, rngs=rngs)
        self.timestep_embed = TimestepEmbedding(hidden_size, rngs=rngs)
        self.label_embed = nnx.Embed(
            num_classes + 1, hidden_size, embedding_init=normal_002, rngs=rngs
        )
        if mask_classes:
            self.mask_embed = MaskEmbedding(mask_classes, patch_size, hidden_size, rngs=rngs)

        def make_block(rngs: nnx.Rngs) -> nnx.Module:
            return BLOCKS[conditioning](hidden_size, num_heads, mlp_ratio, dtype=dtype, rngs=rngs)

        # vmap over one block's constructor: leaves gain a layer axis that xavier's fans do not see
        self.blocks = jax.vmap(make_block)(rngs.split(depth))
        out_size = patch_values * (2 if learn_sigma else 1)
        self.final = FinalLayer(hidden_size, out_size, self.adaptive, rngs=rngs)
        if augment_size:  # without a bias, so that zeros add nothing
            options = dict(use_bias=False, kernel_init=zero_init, precision="highest", rngs=rngs)
            self.augment_embed = nnx.Linear(augment_size, hidden_size, **options)

    @property
    def adaptive(self) -> bool:
        """Whether the condition acts on the layer norms, one vector for the image or a token."""
        return self.blocks.adaptive

    def embed_label(self, y: jax.Array) -> jax.Array:
        """Labels `[B]`, or weights of the classes `[B, num_classes + 1]`, to `[B, D]`."""
        table = gather(self.label_embed.embedding[...])  # [num_classes + 1, D]
        if y.ndim == 1:
            return table[y]
        return multiply("bk,kd->bd", y, table, jnp.float32, jnp.float32)

    def condition(
        self,
        t: jax.Array,
        y: jax.Array,
        mask: jax.Array | None = None,
        augment: jax.Array | None = None,
    ) -> jax.Array:
        """The condition c of the blocks.

        The sum of the embeddings in the adaptive designs, `[B, 1, D]`, or `[B, T, D]` with a mask.
        In the others the sequence of the two, `[B, 2, D]`.
        """
        t = self.timestep_embed(t)[:, None]  # [B or 1, 1, D]
        if augment is not None:
            t = t + self.augment_embed(augment)[:, None]  # [B, 1, D]
        y = self.embed_label(y)[:, None]  # [B, 1, D]
        if not self.adaptive:
            return jnp.concatenate([jnp.broadcast_to(t, y.shape), y], axis=1)
        return t + y if mask is None else t + y + self.mask_embed(mask)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        mask: jax.Array | None = None,
        augment: jax.Array | None = None,
    ) -> jax.Array:
        positions = position_embedding(self.input_size // self.patch_size, self.hidden_size)
        x = self.patch_embed(patchify(x, self.patch_size))  # [B, T, D]
        x = x + positions
        c = self.condition(t, y, mask, augment)  # [B, 1, D], [B, T, D] or [B, 2, D]
        num_patches = x.shape[1]
        if isinstance(self.blocks, InContextBlock):
            x = jnp.concatenate([x, c], axis=1)  # [B, T + 2, D]

        def apply_block(x: jax.Array, block: nnx.Module) -> tuple[jax.Array, None]:
            return block(x, c), None

        # A CPU takes blocks faster one by one; but out of a loop the compiler would undo remat.
        unroll = self.remat == "none" and self.depth <= SHALLOW and is_one_cpu()
        if self.remat != "none":
            apply_block = jax.checkpoint(apply_block, policy=REMAT[self.remat], prevent_cse=False)
        x, _ = jax.lax.scan(apply_block, x, self.blocks, unroll=unroll)
        x = self.final(x[:, :num_patches], c)  # [B, T, p p 2C] or [B, T, p p C]
        return unpatchify(x, self.patch_size)


# Costs

# FLOPs of a training step for each of `multiply_adds`: two, in what costs three forward passes
TRAINING_FLOPS = 6


def count_parameters(module: nnx.Module) -> int:
    """Trainable parameters of a model, a layer, or its `jax.eval_shape`, without statistics."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def multiply_adds(model: DiT) -> int:
    """Multiply-adds of one image's forward pass, matrix products only: the paper's "Gflops" x 1e9.

    FLOPs are twice as many, and those of a training step TRAINING_FLOPS times. Of a block of one's
    own, the parts are counted that are of this file.
    """
    D, p = model.hidden_size, model.patch_size
    patches = (model.input_size // p) ** 2
    patch_values = p**2 * model.in_channels
    tokens = patches + (2 if isinstance(model.blocks, InContextBlock) else 0)
    conditions = patches if model.mask_classes else 1  # vectors c of an image

    embeddings = patches * patch_values * D + TIMESTEP_FEATURES * D + D * D
    embeddings += model.augment_size * D
    if model.mask_classes:
        pixel = 9 * model.mask_classes * MASK_FEATURES + MASK_FEATURES * D
        embeddings += patches * p**2 * pixel
    block = 0
    for _, layer in nnx.iter_modules(model.blocks):
        if isinstance(layer, SelfAttention):
            block += 4 * tokens * D * D + 2 * tokens * tokens * D
        elif isinstance(layer, CrossAttention):
            block += 2 * tokens * D * D + 4 * D * D + 4 * tokens * D
        elif isinstance(layer, MLP):
            block += 2 * tokens * D * layer.up.out_features
        elif isinstance(layer, Modulation):
            block += layer.num_vectors * conditions * D * D
    final = patches * D * patch_values * (2 if model.learn_sigma else 1)
    if model.adaptive:
        final += 2 * conditions * D * D
    return embeddings + model.depth * block + final
