"""Four ways to tell a convolutional denoiser the class: python benchmarks/class_conditioning.py [--steps STEPS]

Trains one small network on the digits with the condition (t + y) concatenated to every feature map, by FiLM behind instance norms, by
conditional batch norm, and by adaLN-Zero (which brings layer norm and a gate); all else equal. Prints parameters (all, and those that take
the condition in), the loss over the last tenth of the steps, and of 1,000 samples the share in the class asked for and the Frechet
distance, as benchmarks/digits.py has them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from digits import judge  # noqa: E402
from dit import sampling  # noqa: E402
from dit.data import batches, open_dataset  # noqa: E402
from dit.config import Data, input_errors, parse, require  # noqa: E402
from dit.ddpm import DDPM  # noqa: E402
from dit.images import from_uint8, to_uint8  # noqa: E402
from dit.model import TimestepEmbedding, count_parameters  # noqa: E402
from dit.normalization import AdaLNZero, ConditionalBatchNorm, FiLM, instance_norm  # noqa: E402
from dit.state import update_ema  # noqa: E402

WIDTH, BLOCKS, BATCH, SAMPLES = 32, 3, 64, 1000


class Block(nnx.Module):
    """A residual block x + conv(silu(norm(x, c))), where `design` says what the norm does with c `[B, WIDTH]`."""

    def __init__(self, design: str, rngs: nnx.Rngs):
        self.design = design
        inputs = 2 * WIDTH if design == "concatenation" else WIDTH
        self.conv1 = nnx.Conv(inputs, WIDTH, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(WIDTH, WIDTH, (3, 3), rngs=rngs)
        layers = {"FiLM": lambda: FiLM(WIDTH, WIDTH, instance_norm, rngs=rngs), "adaLN-Zero": lambda: AdaLNZero(WIDTH, rngs=rngs),
                  "conditional batch norm": lambda: ConditionalBatchNorm(WIDTH, WIDTH, rngs=rngs), "concatenation": lambda: None}
        self.norm = layers[design]()

    def __call__(self, x: jax.Array, c: jax.Array, training: bool) -> tuple[jax.Array, "Block"]:
        """x `[B, H, W, WIDTH]` to its shape, and the block, whose batch statistics have moved in training."""
        def convs(h):
            return self.conv2(nnx.silu(self.conv1(nnx.silu(h))))

        moved = jax.tree.map(lambda leaf: leaf, self)
        if self.design == "adaLN-Zero":
            return self.norm(x, c[:, None, None], convs), moved  # the layer has its own silu
        c = nnx.silu(c)
        if self.design == "concatenation":
            maps = jnp.broadcast_to(c[:, None, None], x.shape)
            return x + convs(jnp.concatenate([instance_norm(x), maps], axis=-1)), moved
        if self.design == "conditional batch norm" and training:
            h, moved.norm = self.norm.train(x, c)
            return x + convs(h), moved
        return x + convs(self.norm(x, c)), moved

    def taking_in(self) -> int:
        """Parameters that take the condition in."""
        return 9 * WIDTH * WIDTH if self.design == "concatenation" else count_parameters(self.norm)


class Denoiser(nnx.Module):
    """`model(x, t, y)` as DiT has it, for images of one channel and a fixed variance."""

    def __init__(self, design: str, rngs: nnx.Rngs):
        self.embed_t, self.embed_y = TimestepEmbedding(WIDTH, dtype=jnp.float32, rngs=rngs), nnx.Embed(11, WIDTH, rngs=rngs)
        self.stem = nnx.Conv(1, WIDTH, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(design, rngs) for _ in range(BLOCKS)])
        self.out = nnx.Conv(WIDTH, 1, (3, 3), kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x, t, y, training: bool = False):
        return self.forward(x, t, y, training)[0]

    def forward(self, x: jax.Array, t: jax.Array, y: jax.Array, training: bool) -> tuple[jax.Array, "Denoiser"]:
        moved, c, x = jax.tree.map(lambda leaf: leaf, self), self.embed_t(t) + self.embed_y(y), self.stem(x)
        for i, block in enumerate(self.blocks):
            x, moved.blocks[i] = block(x, c, training)
        return self.out(nnx.silu(instance_norm(x))), moved


def train(design: str, steps: int, dataset, process: DDPM) -> tuple[Denoiser, float]:
    """The averaged model, and the mean loss of the last tenth of the steps."""
    model = Denoiser(design, nnx.Rngs(0))
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 2e-3, 50, steps))

    @jax.jit
    def step(model, ema, state, n, batch):
        x, (key, drop_key) = from_uint8(batch["image"]), jax.random.split(jax.random.fold_in(jax.random.key(0), n))
        y = jnp.where(jax.random.bernoulli(drop_key, 0.05, batch["label"].shape), 10, batch["label"])

        def loss(model):
            seen = []

            def watched(xt, t, y):
                out, moved = model.forward(xt, t, y, True)
                seen.append(moved)
                return out

            return process.loss(watched, key, x, y)[0], seen[0]

        (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(model)
        updates, state = optimizer.update(grads, state)
        new = optax.apply_updates(model, updates)
        nnx.update(new, nnx.state(moved, nnx.BatchStat))  # gradients of the statistics are zero: they move by themselves
        ema = update_ema(ema, new, n, 0.995)
        return new, ema, state, value

    state, ema, values = optimizer.init(model), model, []
    for n, batch in zip(range(steps), batches(dataset, BATCH, seed=0)):
        model, ema, state, value = step(model, ema, state, n, batch)
        values.append(value)
    return ema, float(np.mean(values[-steps // 10:]))


@dataclass(frozen=True)
class Options:
    steps: int = 1500  # for each of the four, 50 of them to warm up


def main() -> None:
    steps = parse(Options, sys.argv[1:], "benchmarks/class_conditioning.py", __doc__).steps
    require(steps > 50, "--steps", steps, "more than 50")
    dataset, process = open_dataset(Data()), DDPM(schedule="cosine", variance="fixed_small")
    labels = jnp.arange(SAMPLES) % 10

    @jax.jit
    def draw(model):
        keys = sampling.sample_keys(0, jnp.arange(SAMPLES))
        return to_uint8(sampling.ddpm(process, sampling.guided(model, labels, 10), keys, (8, 8, 1), 100, sampling.clip_pixels))

    print(f"{'condition by':<26}{'parameters':>12}{'taking it in':>14}{'loss':>9}{'accuracy':>10}{'Frechet':>9}   ({steps} steps)")
    for design in ("concatenation", "FiLM", "conditional batch norm", "adaLN-Zero"):
        model, loss = train(design, steps, dataset, process)
        accuracy, distance = judge(np.asarray(draw(model)).reshape(SAMPLES, -1) / 127.5 - 1, np.asarray(labels))
        taking_in = sum(block.taking_in() for block in model.blocks)
        print(f"{design:<26}{count_parameters(model):>12,}{taking_in:>14,}{loss:>9.4f}{accuracy:>10.1%}{distance:>9.2f}", flush=True)


if __name__ == "__main__":
    with input_errors("benchmarks/class_conditioning.py"):
        main()
