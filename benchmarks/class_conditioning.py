"""Four ways to tell a denoiser the class: python benchmarks/class_conditioning.py [--steps STEPS]

Trains one small convolutional network on the digits with the condition (t + y) concatenated to
every feature map, by FiLM behind instance norms, by conditional batch norm, and by adaLN-Zero
(which brings layer norm and a gate); all else equal. Prints parameters (all, and those that take
the condition in), the loss over the last tenth of the steps, and two figures of 1,000 samples from
benchmarks/digits.py: the share in the class that was asked for, and the Frechet distance.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import judge
from flax import nnx

from dit import cli, sampling
from dit.config import Data, Range
from dit.data import Dataset, batches, open_dataset
from dit.ddpm import DDPM
from dit.images import from_uint8, to_uint8
from dit.model import TimestepEmbedding, count_parameters
from dit.normalization import AdaLNZero, ConditionalBatchNorm, FiLM, instance_norm
from dit.state import update_ema

WIDTH = 32  # channels of a feature map
DEPTH = 3  # blocks of the network
NUM_CLASSES = 10
IMAGE_SHAPE = (8, 8, 1)
LABEL_DROPOUT = 0.05  # of the null class in place of the label
BATCH = 64
WARMUP_STEPS = 50
LEARNING_RATE = 2e-3
EMA_DECAY = 0.995
SAMPLES = 1000
SAMPLE_STEPS = 100
PROCESS = DDPM(schedule="cosine", variance="fixed_small")

Steps = Annotated[int, Range(lambda value: value > WARMUP_STEPS, f"more than {WARMUP_STEPS}")]


@dataclass(frozen=True)
class Options:
    steps: Steps = 1500  # training steps of each of the four, 50 of them to warm up


def copy_of(module: nnx.Module) -> nnx.Module:
    return jax.tree.map(lambda leaf: leaf, module)


# The four blocks: x [B, H, W, WIDTH] and c [B, WIDTH] to x's shape, and the block, a new one where
# training has updated its batch statistics


class Convolutions(nnx.Module):
    """The residual branch that all four have: `[B, H, W, inputs]` to `[B, H, W, WIDTH]`."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(inputs, WIDTH, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(WIDTH, WIDTH, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv2(nnx.silu(self.conv1(nnx.silu(x))))


class ConcatenationBlock(nnx.Module):
    """The condition as constant feature maps beside those of x."""

    def __init__(self, rngs: nnx.Rngs):
        self.branch = Convolutions(2 * WIDTH, rngs)

    def __call__(self, x: jax.Array, c: jax.Array, training: bool) -> tuple:
        maps = jnp.broadcast_to(nnx.silu(c)[:, None, None], x.shape)
        both = jnp.concatenate([instance_norm(x), maps], axis=-1)  # [B, H, W, 2 WIDTH]
        return x + self.branch(both), self

    def condition_parameters(self) -> int:
        return 3 * 3 * WIDTH * WIDTH  # the half of the first kernel that the maps meet


class FiLMBlock(nnx.Module):
    """FiLM behind instance norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.branch = Convolutions(WIDTH, rngs)
        self.norm = FiLM(WIDTH, WIDTH, instance_norm, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, training: bool) -> tuple:
        return x + self.branch(self.norm(x, nnx.silu(c))), self

    def condition_parameters(self) -> int:
        return count_parameters(self.norm)


class BatchNormBlock(nnx.Module):
    """Conditional batch norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.branch = Convolutions(WIDTH, rngs)
        self.norm = ConditionalBatchNorm(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, training: bool) -> tuple:
        if not training:
            return x + self.branch(self.norm(x, nnx.silu(c))), self
        updated = copy_of(self)
        normal, updated.norm = self.norm.train(x, nnx.silu(c))
        return x + self.branch(normal), updated

    def condition_parameters(self) -> int:
        return count_parameters(self.norm)


class AdaLNZeroBlock(nnx.Module):
    """adaLN-Zero, each place a token."""

    def __init__(self, rngs: nnx.Rngs):
        self.branch = Convolutions(WIDTH, rngs)
        self.norm = AdaLNZero(WIDTH, rngs=rngs)  # takes the silu of c itself

    def __call__(self, x: jax.Array, c: jax.Array, training: bool) -> tuple:
        return self.norm(x, c[:, None, None], self.branch), self

    def condition_parameters(self) -> int:
        return count_parameters(self.norm)


DESIGNS = {
    "concatenation": ConcatenationBlock,
    "FiLM": FiLMBlock,
    "conditional batch norm": BatchNormBlock,
    "adaLN-Zero": AdaLNZeroBlock,
}


class Denoiser(nnx.Module):
    """`model(x, t, y)` as DiT has it, for images of one channel and a fixed variance."""

    def __init__(self, block: type[nnx.Module], rngs: nnx.Rngs):
        self.embed_t = TimestepEmbedding(WIDTH, rngs=rngs)
        self.embed_y = nnx.Embed(NUM_CLASSES + 1, WIDTH, rngs=rngs)
        self.stem = nnx.Conv(1, WIDTH, (3, 3), rngs=rngs)
        self.blocks = nnx.List([block(rngs) for _ in range(DEPTH)])
        zeros = nnx.initializers.zeros
        self.out = nnx.Conv(WIDTH, 1, (3, 3), kernel_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        output, _ = self.forward(x, t, y, training=False)
        return output

    def forward(
        self, x: jax.Array, t: jax.Array, y: jax.Array, training: bool
    ) -> tuple[jax.Array, "Denoiser"]:
        """The output, and the model with updated batch statistics."""
        updated = copy_of(self)
        c = self.embed_t(t) + self.embed_y(y)  # [B, WIDTH]
        x = self.stem(x)  # [B, H, W, WIDTH]
        for i, block in enumerate(self.blocks):
            x, updated.blocks[i] = block(x, c, training)
        return self.out(nnx.silu(instance_norm(x))), updated

    def condition_parameters(self) -> int:
        """The parameters that take the condition in."""
        return sum(block.condition_parameters() for block in self.blocks)


# Training and sampling


def loss_of(
    model: Denoiser, key: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, Denoiser]:
    """The loss in training, and the model with updated batch statistics."""
    calls = []

    def watched(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        output, updated = model.forward(x, t, y, training=True)
        calls.append(updated)
        return output

    loss, _ = PROCESS.loss(watched, key, x, {"y": y})
    return loss, calls[0]


def train(block: type[nnx.Module], steps: int, dataset: Dataset) -> tuple[Denoiser, float]:
    """The averaged model, and the mean loss of the last tenth of the steps."""
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, WARMUP_STEPS, steps)
    optimizer = optax.adam(schedule)

    @jax.jit
    def train_step(model, ema, opt_state, step, batch):
        key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
        dropped = jax.random.bernoulli(drop_key, LABEL_DROPOUT, batch["label"].shape)
        y = jnp.where(dropped, NUM_CLASSES, batch["label"])
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, updated), grads = gradient(model, key, from_uint8(batch["image"]), y)
        updates, opt_state = optimizer.update(grads, opt_state)
        model = optax.apply_updates(model, updates)
        nnx.update(model, nnx.state(updated, nnx.BatchStat))  # the gradient leaves them alone
        return model, update_ema(ema, model, step, EMA_DECAY), opt_state, loss

    model = Denoiser(block, nnx.Rngs(0))
    ema, opt_state = model, optimizer.init(model)
    losses = []
    stream = batches(dataset, BATCH, seed=0)
    for step in range(steps):
        model, ema, opt_state, loss = train_step(model, ema, opt_state, step, next(stream))
        losses.append(loss)
    return ema, float(np.mean(losses[-steps // 10 :]))


@jax.jit
def draw(model: Denoiser, labels: jax.Array) -> jax.Array:
    """An image of each label `[N]`, uint8 `[N, 8, 8, 1]`."""
    keys = sampling.sample_keys(0, jnp.arange(len(labels)))
    denoise, correct = partial(model, y=labels), sampling.clip_pixels
    x = sampling.ddpm(PROCESS, denoise, keys, IMAGE_SHAPE, SAMPLE_STEPS, correct)
    return to_uint8(x)


def main() -> None:
    steps = cli.parse(Options, sys.argv[1:], "benchmarks/class_conditioning.py", __doc__).steps
    dataset = open_dataset(Data())
    labels = np.arange(SAMPLES) % NUM_CLASSES
    header = f"{'condition by':<26}{'parameters':>12}{'taking it in':>14}{'loss':>9}"
    print(f"{header}{'accuracy':>10}{'Frechet':>9}   ({steps} steps)")
    for name, block in DESIGNS.items():
        model, loss = train(block, steps, dataset)
        images = np.asarray(draw(model, labels))
        counts = f"{count_parameters(model):>12,}{model.condition_parameters():>14,}"
        scores = judge(images, labels, "train")
        shown = f"{scores['accuracy']:>10.1%}{scores['frechet_distance']:>9.2f}"
        print(f"{name:<26}{counts}{loss:>9.4f}{shown}", flush=True)


if __name__ == "__main__":
    with cli.exit_status("benchmarks/class_conditioning.py"):
        main()
