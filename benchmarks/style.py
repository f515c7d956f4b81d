"""What style by statistics does to CIFAR-10 samples: python benchmarks/style.py WORKDIR [--samples SAMPLES]

Draws samples of a CIFAR-10 model without a style and with that of real images of high and low contrast, and prints how far their channel
means and deviations are from the style's, and the share that a small convolutional network, trained here on the real images, puts in the
class asked for.
"""

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from dit import checkpoint  # noqa: E402
from dit.config import input_errors, parse, require  # noqa: E402
from dit.data import batches, open_dataset  # noqa: E402
from dit.images import from_uint8  # noqa: E402
from dit.normalization import instance_norm  # noqa: E402


class Classifier(nnx.Module):
    """Three strided convolutions and a linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in ((3, 32), (32, 64), (64, 128))])
        self.linear = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = nnx.relu(instance_norm(conv(x)))
        return self.linear(x.mean(axis=(1, 2)))


def train_classifier(dataset, steps: int = 2000) -> Classifier:
    model, optimizer = Classifier(nnx.Rngs(0)), optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def step(model, state, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(from_uint8(x)), y).mean()

        updates, state = optimizer.update(jax.grad(loss)(model), state)
        return optax.apply_updates(model, updates), state

    state = optimizer.init(model)
    for _, batch in zip(range(steps), batches(dataset, 128, seed=0)):
        model, state = step(model, state, batch["image"], batch["label"])
    return model


def statistics(images: np.ndarray) -> np.ndarray:
    """Channel means and deviations `[N, 2 C]` of uint8 images, in [-1, 1]."""
    x = images / 127.5 - 1
    return np.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2))], axis=1)


@dataclass(frozen=True)
class Options:
    workdir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORKDIR")]  # of a CIFAR-10 run
    samples: int = 500  # with each style


def main() -> None:
    options = parse(Options, sys.argv[1:], "benchmarks/style.py", __doc__)
    _, config = checkpoint.load(options.workdir)
    require(config.data.name == "cifar10", "WORKDIR", options.workdir, "the folder of a CIFAR-10 run")
    dataset = open_dataset(config.data)
    classifier = jax.jit(train_classifier(dataset).__call__)
    real = open_dataset(dataclasses.replace(config.data, split="test")).records
    right = np.argmax(classifier(from_uint8(jnp.asarray(real.images[:2000]))), axis=1) == real.labels[:2000]
    print(f"the classifier on held-out real images: {right.mean():.1%}")
    found = statistics(dataset.records.images)
    contrast = found[:, 3:].sum(axis=1) + np.abs(found[:, 0] - found[:, 2])  # of light, and between red and blue
    order = np.argsort(contrast)
    chosen = {"faint": order[100], "ordinary": order[len(order) // 2], "strong": order[-100]}
    print(f"{'style':<12}{'distance without':>18}{'with':>10}{'ratio':>8}{'accuracy without':>18}{'with':>8}")
    with tempfile.TemporaryDirectory() as folder:
        drawn = {}
        for name, index in [(None, None), *chosen.items()]:
            style = f"{folder}/{name}.png"
            if name:
                Image.fromarray(dataset.records.images[index]).save(style)
            sample.run(sample.Sample(options.workdir, num_samples=options.samples, guidance=2.0, style=style if name else None,
                                     out=f"{folder}/x.npz"))
            arrays = np.load(f"{folder}/x.npz")
            accuracy = float((np.argmax(classifier(from_uint8(jnp.asarray(arrays["arr_0"]))), axis=1) == arrays["arr_1"]).mean())
            drawn[name] = statistics(arrays["arr_0"]), accuracy
            if name:
                without, with_style = (np.abs(drawn[k][0] - found[index]).mean() for k in (None, name))
                print(f"{name:<12}{without:>18.4f}{with_style:>10.4f}{without / with_style:>8.1f}"
                      f"{drawn[None][1]:>18.1%}{accuracy:>8.1%}")


if __name__ == "__main__":
    with input_errors("benchmarks/style.py"):
        main()
