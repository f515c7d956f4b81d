"""A state saved, restored and kept; models loaded."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    TINY,
    at_step,
    awake_state,
    awaken,
    digits,
    files,
    folder,
    largest_difference,
    run_config,
    run_sample,
    run_train,
    save_steps,
    tiny_config,
)
from test_intact import change_json, harm, seal

from dit import checkpoint, intact, resume
from dit.config import Config, InputError, replace
from dit.sharding import make_mesh, replicated
from dit.state import abstract_state, make_model, make_state

# Saved and restored


def test_a_state_comes_back_bit_for_bit_where_it_was(saved):
    workdir, config, state = saved
    restored = checkpoint.restore(workdir, 20, abstract_state(config, make_mesh(config)))
    assert int(restored.step) == 20
    before = jax.tree.leaves(at_step(state, 20))
    for a, b in zip(before, jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype
        assert b.sharding.is_equivalent_to(a.sharding, a.ndim)


@pytest.mark.slow
def test_several_averages_come_back_each_as_an_item_of_its_own(tmp_path):
    config = run_config(tmp_path)
    config = replace(config, optim=dict(ema_decay=(0.9, 0.99, 0.5)))
    state = awake_state(config)
    save_steps(config, state, [10])
    items = {path.name for path in folder(tmp_path, 10).iterdir() if path.is_dir()}
    assert items >= {"ema", "ema_0.99", "ema_0.5"}
    assert largest_difference(state.emas[0], state.emas[2]) > 1e-3
    others = replace(config, optim=dict(ema_decay=(0.8, 0.7, 0.6)))  # a run may change them
    for wanted in (config, others):
        restored = resume.restore(wanted, make_mesh(config), 10)
        assert largest_difference(restored.emas, state.emas) == 0
    for ema, average in [(True, 0), (0.9, 0), (0.99, 1), (0.5, 2)]:
        loaded, _ = checkpoint.load(tmp_path, ema)
        expected = jax.device_put(state.emas[average], jax.devices()[0])
        assert largest_difference(loaded, expected) == 0
    with pytest.raises(InputError, match="^ema: 0.1 should be one of the run's decays: 0.9, 0.99"):
        checkpoint.load(tmp_path, 0.1)


def test_a_state_can_be_restored_to_other_devices(saved):
    workdir, config, state = saved
    one_device = make_mesh(config, jax.devices()[:1])
    restored = checkpoint.restore(workdir, 20, abstract_state(config, one_device))
    assert all(leaf.sharding.num_devices == 1 for leaf in jax.tree.leaves(restored))
    moved = jax.device_put(state.model, jax.devices()[0])
    assert largest_difference(moved, restored.model) == 0


def test_a_checkpoint_holds_the_config_and_the_facts_of_the_data(saved):
    workdir, config, _ = saved
    items = {path.name for path in folder(workdir, 20).iterdir() if path.is_dir()}
    assert items == {"model", "ema", "optimizer", "config", "dataset", "log"}
    assert intact.stored_config(workdir, 20) == config
    facts = {"class_names": list("0123456789"), "num_examples": 1797}
    assert intact.stored_dataset(workdir, 20) == facts


def test_a_step_that_is_saved_already_is_left_alone(copy):
    workdir, config = copy
    before = files(workdir)
    save_steps(config, make_state(config, make_mesh(config)), [20])
    after = files(workdir)
    assert {name: after[name] for name in before} == before


def test_what_the_log_holds_is_saved_as_it_is_at_the_step(saved, tmp_path, monkeypatch):
    """The log goes on with it before Orbax writes."""
    sums = {"steps": 2, "loss": 3.0}

    def go_on_and_save(step: int, args) -> None:
        sums["loss"] = 5.0
        save(step, args=args)

    with checkpoint.Checkpoints(run_config(tmp_path), digits()) as checkpoints:
        save = checkpoints.manager.save
        monkeypatch.setattr(checkpoints.manager, "save", go_on_and_save)
        checkpoints.save(at_step(saved[2], 10), sums)
    assert intact.stored_metrics(tmp_path, 10) == {"steps": 2, "loss": 3.0}


def test_the_last_few_and_every_nth_are_kept(saved, tmp_path):
    config = run_config(tmp_path, keep_last=2, keep_every=4)
    save_steps(config, saved[2], [2, 4, 6, 8, 10, 12])
    assert intact.steps(tmp_path) == [12, 10, 8, 4]
    for step in (4, 8, 10, 12):
        assert intact.damage(folder(tmp_path, step)) is None


def test_without_keep_every_the_last_few_alone_are_kept(saved, tmp_path):
    config = run_config(tmp_path, keep_last=1, keep_every=0)
    save_steps(config, saved[2], [2, 4, 6])
    assert intact.steps(tmp_path) == [6]


# What is not as written


def test_arrays_of_other_sizes_than_the_config_says_are_refused_by_name(copy):
    workdir, config = copy
    change_json(workdir, "config", lambda values: values["model"].update(depth=10**9))
    item = folder(workdir, 20) / "ema"
    name = "blocks.attention.proj.bias.value"
    expected = f"{item}: {name}: 'float32[2, 20]' should be float32[1000000000, 20], as its config"
    with pytest.raises(InputError) as refusal:
        checkpoint.load(workdir)
    assert str(refusal.value).startswith(expected)


def test_a_state_of_another_size_or_step_is_refused(copy):
    workdir, config = copy
    clipped = replace(config, optim=dict(grad_clip=1.0))
    with pytest.raises(InputError, match="optimizer: opt_state.0.count: .* should be nothing"):
        checkpoint.restore(workdir, 20, abstract_state(clipped, make_mesh(config)))
    folder(workdir, 20).rename(folder(workdir, 30))
    with pytest.raises(InputError, match="checkpoints/30: step: 20 should be 30, the name of the"):
        checkpoint.restore(workdir, 30, abstract_state(config, make_mesh(config)))


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_arrays_that_orbax_cannot_read_are_refused_in_one_line(copy, name):
    workdir, _ = copy
    (folder(workdir, 20) / "ema" / name).write_text("{}")
    seal(folder(workdir, 20))
    with pytest.raises(InputError, match=f"^{folder(workdir, 20)}/ema: ") as refusal:
        checkpoint.load(workdir)
    assert "\n" not in str(refusal.value)


# Models


def test_load_gives_the_average_unless_told_otherwise(saved):
    workdir, stored, state = saved
    ema, config = checkpoint.load(workdir)
    last, _ = checkpoint.load(workdir, ema=False)
    one_device = jax.device_put(state, jax.devices()[0])
    assert config == stored
    assert largest_difference(ema, one_device.ema) == 0
    assert largest_difference(last, one_device.model) == 0
    assert largest_difference(ema, last) > 1e-3
    answer = ema(jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, int))
    assert answer.shape == (1, 8, 8, 2)


def test_load_puts_the_parameters_where_and_for_what_type_it_is_told(saved):
    workdir, config, _ = saved
    everywhere = replicated(make_mesh(config))
    model, loaded = checkpoint.load(workdir, sharding=everywhere, dtype="bfloat16")
    assert {leaf.sharding for leaf in jax.tree.leaves(model)} == {everywhere}
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    assert (model.dtype, loaded.train.dtype) == (jnp.bfloat16, "bfloat16")


def test_weights_that_are_not_finite_are_refused(refused, tmp_path):
    config = run_config(tmp_path / "x")
    model = make_model(config, jax.random.key(0))
    poisoned = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), model)
    checkpoint.save_weights(tmp_path / "x", poisoned, config, tuple("0123456789"))
    line = refused(run_sample, tmp_path / "x", "--out", tmp_path / "x.png")
    assert "should be of finite weights, which those of checkpoint 0 are not" in line
    assert not (tmp_path / "x.png").exists()


def test_load_reads_the_step_it_is_told(copy):
    workdir, _ = copy
    shutil.rmtree(folder(workdir, 20) / "ema")
    newer, _ = checkpoint.load(workdir, ema=False, step=20)
    older, _ = checkpoint.load(workdir, step=10)
    assert largest_difference(newer, older) > 1e-3


@pytest.fixture
def weights(tmp_path) -> tuple[Path, Config, object]:
    """A folder of weights that no run trained, its config and its model."""
    config = tiny_config()
    model = awaken(make_model(config, jax.random.key(0)))
    checkpoint.save_weights(tmp_path / "weights", model, config, tuple("abcdefghij"))
    return tmp_path / "weights", config, model


def test_weights_that_no_run_trained_are_saved_and_loaded(weights):
    path, config, model = weights
    loaded, stored = checkpoint.load(path)
    assert largest_difference(loaded, model) == 0
    assert stored == config
    assert intact.newest(path) == (0, [])
    facts = {"class_names": list("abcdefghij"), "num_examples": None}
    assert intact.stored_dataset(path, 0) == facts
    assert [p.name for p in path.parent.iterdir()] == ["weights"], "nothing beside it"
    with pytest.raises(InputError, match="^ema: False should be True: converted weights are one"):
        checkpoint.load(path, ema=False)


def test_damaged_weights_are_refused(weights):
    path, _, _ = weights
    harm(folder(path, 0) / "ema/_METADATA", "damaged")
    with pytest.raises(InputError, match="0: ema/_METADATA is damaged"):
        checkpoint.load(path)


def test_no_run_goes_on_from_converted_weights(refused, weights):
    path, config, _ = weights
    before = files(path)
    with pytest.raises(InputError, match="it holds converted weights, from which no run goes on"):
        resume.step_to_resume(replace(config, train=dict(workdir=str(path))), digits())
    line = refused(run_train, *TINY, "--workdir", path)
    assert line.startswith(
        f"train.py: train.workdir: {str(path)!r} should be a run's folder or new"
    )
    assert files(path) == before
