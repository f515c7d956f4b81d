"""The PyTorch DiT of the benchmarks, and its peers, do the work that ours does. `make parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit import cli
from dit.config import Config, InputError, replace
from dit.model import count_parameters
from dit.state import make_init, make_objective

pytestmark = pytest.mark.parity


def tiny_config(**train) -> Config:
    config = cli.load_preset("digits")
    config = replace(config, objective=dict(min_snr_gamma=None), optim=dict(grad_clip=1.0))
    return replace(config, model=dict(hidden_size=20, num_heads=5, depth=2), train=train)


@pytest.mark.parametrize("preset", ["cifar10", "imagenet256_s2"])
def test_it_has_as_many_parameters(preset):
    import torch_dit

    config = cli.load_preset(preset)
    ours = count_parameters(jax.eval_shape(make_init(config)).model)
    assert ours == sum(p.numel() for p in torch_dit.DiT(config).parameters())


def test_its_loss_equals_ours():
    import torch
    import torch_dit

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

    losses = losses_of("torch_dit", tiny_config(batch_size=16, dtype=dtype), steps=60)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


# Its peers


def losses_of(peer: str, config: Config, steps: int) -> list[float]:
    import torch_dit

    step = torch_dit.make_step(config, torch_dit.import_peer(peer), "cpu", compiled=False)
    return [float(step()) for _ in range(steps)]


def test_diffusers_has_as_many_parameters_but_embeds_the_condition_in_each_block():
    import torch_dit

    config = tiny_config()
    ours = torch_dit.DiT(config)
    embeddings = (ours.timestep_fc1, ours.timestep_fc2, ours.label_embed)
    copies = (config.model.depth - 1) * sum(map(count_torch_parameters, embeddings))
    theirs = torch_dit.import_peer("diffusers")(config)
    assert count_torch_parameters(theirs) == count_torch_parameters(ours) + copies


def count_torch_parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_diffusers_from_a_zero_output_has_the_loss_of_ours():
    import torch
    import torch_dit

    config = tiny_config(batch_size=7)

    def make_zero(config: Config):
        model = torch_dit.import_peer("diffusers")(config)
        torch.nn.init.zeros_(model.proj_out_2.weight)
        torch.nn.init.zeros_(model.proj_out_2.bias)
        torch.manual_seed(1)
        return model

    def make_ours(config: Config):
        model = torch_dit.DiT(config)
        torch.manual_seed(1)
        return model

    ours, theirs = (
        float(torch_dit.make_step(config, make_model, "cpu", compiled=False)())
        for make_model in (make_ours, make_zero)
    )
    assert theirs == pytest.approx(ours, rel=1e-6)


PUBLISHED = """
import torch_dit
from dit.config import Config, Data, Model

class Other(torch_dit.DiT):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                 mlp_ratio, class_dropout_prob, num_classes, learn_sigma):
        assert learn_sigma and class_dropout_prob == 0.05
        model = Model(hidden_size, depth, num_heads, patch_size, mlp_ratio)
        data = Data(image_size=input_size, channels=in_channels, num_classes=num_classes)
        super().__init__(Config(model=model, data=data))

    def forward(self, x, t, y):
        assert not self.training  # in which it would drop labels, beside those that the step drops
        return super().forward(x, t, y)
"""


def test_the_class_of_a_file_is_built_by_the_published_arguments(tmp_path):
    (tmp_path / "published.py").write_text(PUBLISHED)
    config = tiny_config(batch_size=7)
    losses = losses_of(f"{tmp_path}/published.py:Other", config, steps=3)
    assert losses == losses_of("torch_dit", config, steps=3)
    with pytest.raises(InputError, match="published.py:DiT' should be FILE.py:CLASS"):
        losses_of(f"{tmp_path}/published.py:DiT", config, steps=1)
