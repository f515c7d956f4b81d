"""A small classifier of CIFAR-10's images, trained on the spot: minutes on two CPU cores.

A residual network of six 3 x 3 convolutions, which sees 2 x 2 pixels as one of 12 channels. It is
kept in the user's cache, and trained again for other images or another version of this file.
"""

import zlib
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dit import cli
from dit.data import Dataset, InMemory, batches
from dit.files import whole
from dit.images import from_uint8
from dit.progress import Progress, say

WIDTHS = (32, 64, 128)  # channels of each stage, of which the last are the features
CLASSES = 10
STEPS = 2400
BATCH = 128
LEARNING_RATE = 0.1  # at its peak, after a fifth of the steps; then half a cosine
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
SHIFT = 3  # pixels by which a training image is moved, at most
ROWS = 500  # images that are classified at a time


class Layer(nnx.Module):
    """A 3 x 3 convolution, batch norm and a ReLU: `[B, H, W, inputs]` to `[B, H, W, outputs]`."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        he = nnx.initializers.he_normal()
        self.conv = nnx.Conv(inputs, outputs, (3, 3), use_bias=False, kernel_init=he, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.95, rngs=rngs)

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x), use_running_average=not training))


def squares(x: jax.Array) -> jax.Array:
    """The 2 x 2 squares of x `[B, H, W, C]`: `[B, H / 2, W / 2, 4, C]`."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // 2, 2, W // 2, 2, C).swapaxes(2, 3)
    return x.reshape(B, H // 2, W // 2, 4, C)


def halve(x: jax.Array) -> jax.Array:
    """The maximum of each square of x `[B, H, W, C]`: `[B, H / 2, W / 2, C]`.

    By pairs: XLA may round what the gradient of `max` compares differently, and find no maximum.
    """
    a, b, c, d = jnp.unstack(squares(x), axis=3)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


class Stage(nnx.Module):
    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.widen = Layer(inputs, outputs, rngs)
        self.residual = Layer(outputs, outputs, rngs)

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        x = self.widen(x, training)
        return x + self.residual(x, training)


class Classifier(nnx.Module):
    """x `[B, H, W, 3]` in [-1, 1] to features `[B, D]` and logits `[B, CLASSES]`."""

    def __init__(self, widths: tuple[int, int, int], rngs: nnx.Rngs):
        first, second, third = widths
        self.first = Stage(12, first, rngs)
        self.second = Stage(first, second, rngs)
        self.third = Stage(second, third, rngs)
        self.linear = nnx.Linear(third, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, training: bool = False) -> tuple[jax.Array, jax.Array]:
        x = squares(x)
        x = x.reshape(*x.shape[:3], -1)  # [B, H / 2, W / 2, 12]
        x = halve(self.first(x, training))  # [B, H / 4, W / 4, C]
        x = halve(self.second(x, training))  # [B, H / 8, W / 8, C]
        features = self.third(x, training).mean(axis=(1, 2))  # [B, D]
        return features, self.linear(features)


# Training


def augment(images: jax.Array, key: jax.Array) -> jax.Array:
    """uint8 images `[B, H, W, 3]` in [-1, 1], at random mirrored and moved, grey coming in."""
    mirror_key, move_key = jax.random.split(key)
    x = from_uint8(images)
    mirrored = jax.random.bernoulli(mirror_key, 0.5, (len(x), 1, 1, 1))
    x = jnp.where(mirrored, x[:, :, ::-1], x)
    padded = jnp.pad(x, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    corners = jax.random.randint(move_key, (len(x), 2), 0, 2 * SHIFT + 1)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), x.shape[1:])

    return jax.vmap(cut)(padded, corners)


def loss(model: Classifier, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, Classifier]:
    """The cross-entropy, and the model with new batch statistics."""
    model = jax.tree.map(lambda leaf: leaf, model)  # a copy
    _, logits = model(x, training=True)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), LABEL_SMOOTHING)
    return optax.softmax_cross_entropy(logits, targets).mean(), model


def train(
    images: np.ndarray,
    labels: np.ndarray,
    steps: int = STEPS,
    widths: tuple[int, int, int] = WIDTHS,
) -> Classifier:
    """A classifier of uint8 images `[N, H, W, 3]`: the same one every time on one machine."""
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, steps // 5, steps)
    sgd = optax.sgd(schedule, MOMENTUM, nesterov=True)
    optimizer = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), sgd)

    @jax.jit
    def step(model: Classifier, opt_state: optax.OptState, batch: dict, number: int) -> tuple:
        x = augment(batch["image"], jax.random.fold_in(jax.random.key(1), number))
        grads, updated = jax.grad(loss, has_aux=True)(model, x, batch["label"])
        updates, opt_state = optimizer.update(grads, opt_state, model)
        model = optax.apply_updates(model, updates)
        nnx.update(model, nnx.state(updated, nnx.BatchStat))  # the gradient leaves them alone
        return model, opt_state

    model = Classifier(widths, nnx.Rngs(0))
    opt_state = optimizer.init(model)
    stream = batches(Dataset(InMemory(images, labels), ()), BATCH, seed=0)
    with closing(Progress(steps, "step")) as progress, closing(stream):
        for number in range(steps):
            model, opt_state = step(model, opt_state, next(stream), number)
            progress.advance(1)
    return model


def load_or_train(images: np.ndarray, labels: np.ndarray) -> Classifier:
    """The classifier of uint8 images `[N, H, W, 3]`, from the user's cache where it is there."""
    number = zlib.crc32(Path(__file__).read_bytes())
    number = zlib.crc32(labels, zlib.crc32(images, number))
    path = cli.CACHE / "classifiers" / f"{number:08x}.npz"
    if not path.is_file():
        say("training the classifier that judges, which the next call finds in the user's cache")
        model = train(images, labels)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, *jax.tree.leaves(model))
    tree = jax.tree.structure(jax.eval_shape(lambda: Classifier(WIDTHS, nnx.Rngs(0))))
    with np.load(path) as file:
        return jax.tree.unflatten(tree, [jnp.asarray(file[name]) for name in file.files])


# Classifying


@jax.jit
def forward(model: Classifier, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    features, logits = model(from_uint8(images))
    return features, logits.argmax(axis=-1)


def classify(model: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features `[N, D]` and classes `[N]` of uint8 images `[N, H, W, 3]`."""
    found = []
    for i in range(0, len(images), ROWS):
        some = images[i : i + ROWS]
        filled = np.resize(some, (ROWS, *some.shape[1:]))  # so that one program serves all
        found.append([np.asarray(a)[: len(some)] for a in forward(model, filled)])
    features, classes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return features, classes
