"""The loss on images that a run is not trained on: where it rises, the run overfits.

The same images are always at the same times under the same noise, so that a curve of it is smooth.
It is the loss of labelled images as they are: nothing is dropped, and none is augmented but by
data.flip.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from dit.config import Config
from dit.data import augment, open_dataset
from dit.files import renaming
from dit.model import DiT
from dit.sharding import place_batch, replicated
from dit.state import make_objective

AT_MOST = 1024  # images, evenly spaced over the split, and what fills their last batch
TAG = 2**30  # folded into the run's seed


def make_held_out_loss(config: Config, mesh: jax.sharding.Mesh) -> Callable[[DiT], float]:
    """The function (model) -> its loss on the images of `eval.split`. Raises InputError."""
    data = dataclasses.replace(config.data, split=config.eval.split, augment=0.0)
    with renaming({"data.split": "eval.split"}):
        records = open_dataset(data).records
    batch_size = config.train.batch_size
    num_batches = math.ceil(min(len(records), AT_MOST) / batch_size)
    indices = np.linspace(0, len(records) - 1, num_batches * batch_size).astype(int)
    indices = indices.reshape(num_batches, jax.process_count(), -1)
    batches = [records.read(rows) for rows in indices[:, jax.process_index()]]  # this host's rows
    objective = make_objective(config)
    key = jax.random.fold_in(jax.random.key(config.train.seed), TAG)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def loss_of(model: DiT, batch: dict[str, jax.Array], number: int) -> jax.Array:
        data_key, noise_key = jax.random.split(jax.random.fold_in(key, number))
        x, condition = augment(batch, data_key, data)
        loss, _ = objective.loss(model, noise_key, x, condition)
        return loss

    def held_out_loss(model: DiT) -> float:
        with jax.set_mesh(mesh):  # so that sharded weights are gathered, as in training
            losses = [
                loss_of(model, place_batch(batch, mesh), number)
                for number, batch in enumerate(batches)
            ]
        return float(np.mean(jax.device_get(losses)))

    return held_out_loss
