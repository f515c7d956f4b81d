"""The PyTorch DiT of the benchmarks does the work that ours does. `make parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit import cli
from dit.config import Config, replace
from dit.model import count_parameters
from dit.state import make_init, make_objective

pytestmark = pytest.mark.parity


def tiny_config(**train) -> Config:
    config = cli.load_preset("digits")
    config = replace(config, objective=dict(min_snr_gamma=None), optim=dict(grad_clip=1.0))
    return replace(config, model=dict(hidden_size=20, num_heads=5, depth=2), train=train)


@pytest.mark.parametrize("preset", ["cifar10", "imagenet256_s2"])
def test_it_has_as_many_parameters(preset):
    from benchmarks import torch_dit

    config = cli.load_preset(preset)
    ours = count_parameters(jax.eval_shape(make_init(config)).model)
    assert ours == sum(p.numel() for p in torch_dit.DiT(config).parameters())


def test_its_loss_equals_ours():
    import torch

    from benchmarks import torch_dit

    config = tiny_config()
    objective = make_objective(config)
    tables = torch_dit.make_tables(config, "cpu")
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (211, 1, 8, 8)).astype(np.float32)
    output = rng.normal(size=(211, 2, 8, 8)).astype(np.float32)
    seen = {}

    def model(xt, t, y):
        seen.update(xt=xt.numpy(), t=t.numpy())
        return torch.tensor(output)

    torch.manual_seed(2)
    theirs = torch_dit.loss(model, torch.tensor(x), torch.zeros(211), tables, torch.float32)
    assert 0 in seen["t"]  # where the likelihood stands in for the divergence

    def last(images: np.ndarray) -> jax.Array:
        return jnp.asarray(images.transpose(0, 2, 3, 1))

    x0, xt, t = last(x), last(seen["xt"]), jnp.asarray(seen["t"])
    noise = objective.pred_eps(x0, xt, t)
    ours = sum(part.mean() for part in objective.losses(last(output), x0, xt, t, noise))
    assert float(theirs) == pytest.approx(float(ours), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(dtype):
    from benchmarks import torch_dit

    step = torch_dit.make_step(tiny_config(batch_size=16, dtype=dtype), "cpu", compiled=False)
    losses = [float(step()) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
