"""What a run goes on from: which run may, with what changes, and the weights of another model."""

import dataclasses
import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    TINY,
    at_step,
    awaken,
    digits,
    files,
    folder,
    largest_difference,
    run_config,
    run_train,
    tiny_config,
)

from dit import checkpoint, intact, resume, run, sharding
from dit.config import Config, InputError, Mesh, Model, Optim, Train, from_json, replace
from dit.data import Dataset
from dit.sharding import make_mesh
from dit.state import abstract_state, leaves_by_name, make_model, make_state

ROOT = Path(__file__).resolve().parent.parent


# Which run may go on


def test_the_same_run_goes_on_from_its_newest_checkpoint(saved):
    workdir, config, _ = saved
    assert resume.step_to_resume(config, digits()) == (20, [])
    longer = replace(config, train=dict(steps=1000, log_every=7), mesh=dict(fsdp=2))
    assert resume.step_to_resume(longer, digits()) == (20, [])


def test_differences_name_field_and_both_values():
    ours = Config(model=Model(depth=4), train=Train(seed=1))
    expected = {"model.depth": [12, 4], "train.seed": [0, 1]}
    assert resume.differences(ours, Config()) == expected
    assert resume.differences(ours, ours) == {}


def test_where_a_run_computes_and_keeps_its_files_makes_no_difference():
    ours = Config(
        name="x",
        model=Model(remat="full"),
        optim=Optim(accumulate=2),
        mesh=Mesh(fsdp=2),
        train=Train(log_every=1, checkpoint_every=1, sampler="ddpm", workdir="there"),
    )
    assert resume.differences(ours, Config()) == {}
    here, there = Config(), Config()
    here = replace(here, data=dict(latents="here", image_size=256))
    there = replace(there, data=dict(latents="there", image_size=256, vae="vae"))
    assert resume.differences(here, there) == {}


def test_latents_and_pixels_are_no_one_run():
    latents = replace(Config(), data=dict(latents="here", image_size=256, channels=3))
    pixels = replace(latents, data=dict(latents=None))
    expected = {"input_shape": [(256, 256, 3), (32, 32, 4)]}
    assert resume.differences(latents, pixels) == expected


WITHOUT_EFFECT = {"remat", "accumulate", "latents", "vae"}


@pytest.mark.parametrize("section", ["model", "objective", "data", "optim"])
def test_every_field_that_a_step_depends_on_is_compared(section):
    ours = Config()
    for field in dataclasses.fields(getattr(ours, section)):
        value = getattr(getattr(ours, section), field.name)
        theirs = replace(ours, **{section: {field.name: "another"}})
        found = resume.differences(ours, theirs)
        if field.name not in WITHOUT_EFFECT:
            assert found[f"{section}.{field.name}"] == ["another", value]
        elif field.name != "latents":  # which changes the shape
            assert found == {}


@pytest.mark.parametrize(
    "changes",
    [
        dict(optim=dict(beta1=0.5)),
        dict(optim=dict(warmup_steps=5)),
        dict(optim=dict(ema_decay=(0.9, 0.5))),
        dict(train=dict(seed=1)),
        dict(train=dict(init_from="elsewhere")),
        dict(data=dict(flip=False)),
    ],
)
def test_a_run_of_another_kind_is_refused_and_left_as_it_is(copy, changes):
    workdir, config = copy
    (folder(workdir, 20) / "optimizer/_METADATA").unlink()  # damaged
    before = files(workdir)
    ((section, fields),) = changes.items()
    ((field, value),) = fields.items()
    with pytest.raises(InputError) as refusal:
        steered = replace(config, optim=dict(learning_rate=0.5))
        resume.step_to_resume(replace(steered, **changes), digits())
    line = str(refusal.value)
    stored = getattr(getattr(config, section), field)
    assert line.startswith(f"{section}.{field}: {value!r}, where {stored!r} is stored in ")
    assert line.endswith("so set it back or choose another --name")
    assert files(workdir) == before, "not even the damaged checkpoint is renamed"


def test_a_run_on_other_data_is_refused(saved):
    _, config, _ = saved
    few = Dataset([0] * 5, tuple("0123456789"))
    with pytest.raises(InputError, match="data: 5 images, where the run was trained on 1797"):
        resume.step_to_resume(config, few)


# With what changes


def history(workdir: Path) -> list | None:
    return json.loads((workdir / "config.json").read_text()).get("history")


def test_what_steers_a_run_may_change_and_is_said_and_recorded(copy):
    workdir, config = copy
    resume.prepare_workdir(config, 20).close()
    assert history(workdir) is None
    steered = replace(
        config,
        optim=dict(learning_rate=0.5, grad_clip=2.0, ema_decay=0.5),
        train=dict(steps=30),
    )
    assert resume.step_to_resume(steered, digits()) == (20, [])
    assert resume.describe_changes(steered, 20) == [
        "optim.learning_rate is now 0.5, and was 0.001",
        "optim.grad_clip is now 2.0, and was None",
        "optim.ema_decay is now 0.5, and was 0.99",
        "train.steps is now 30, and was 4",
    ]
    assert resume.describe_changes(config, 20) == []
    assert resume.describe_changes(steered, 0) == [], "a new run changes nothing"
    resume.prepare_workdir(steered, 20).close()
    values = json.loads((workdir / "config.json").read_text())
    entry = {
        "step": 20,
        "optim.learning_rate": [0.001, 0.5],
        "optim.grad_clip": [None, 2.0],
        "optim.ema_decay": [0.99, 0.5],
        "train.steps": [4, 30],
    }
    assert values.pop("history") == [entry]
    assert from_json(values) == steered


def test_the_history_is_of_the_steps_that_the_run_has_kept(copy):
    workdir, config = copy
    slower, faster = (replace(config, optim=dict(learning_rate=rate)) for rate in (0.1, 0.7))
    shutil.rmtree(folder(workdir, 20))
    resume.prepare_workdir(slower, 10).close()
    at_10 = {"step": 10, "optim.learning_rate": [0.001, 0.1]}
    assert history(workdir) == [at_10]
    folder(workdir, 10).rename(folder(workdir, 20))
    resume.prepare_workdir(faster, 20).close()
    at_20 = {"step": 20, "optim.learning_rate": [0.001, 0.7]}
    assert history(workdir) == [at_10, at_20]
    resume.prepare_workdir(faster, 20).close()
    assert history(workdir) == [at_10, at_20], "once"
    folder(workdir, 20).rename(folder(workdir, 10))
    resume.prepare_workdir(config, 10).close()
    assert history(workdir) is None


def test_a_checkpoint_that_another_run_has_made_meanwhile_is_left_to_it(copy):
    workdir, config = copy
    before = files(workdir)
    expected = (
        "train.workdir: .* should be of no other run, which has just saved step 20; try again"
    )
    with pytest.raises(InputError, match=expected):
        resume.prepare_workdir(config, 10)
    assert before.items() <= files(workdir).items()
    resume.prepare_workdir(config, 20).close()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"history": 3}', '{"history": [{}, {"step": 1}]}']
)
def test_a_config_json_that_is_not_as_written_has_no_history(copy, text):
    workdir, config = copy
    (workdir / "config.json").write_text(text)
    resume.prepare_workdir(config, 20).close()
    assert json.loads((workdir / "config.json").read_text()) == dataclasses.asdict(config)


def test_a_stored_config_with_a_history_is_none(saved):
    values = json.loads(saved[1].to_json()) | {"history": []}
    with pytest.raises(InputError, match="history: .* should be left out: this version has no"):
        from_json(values)


def test_a_cosine_says_where_it_goes_on(copy):
    workdir, config = copy
    config = replace(config, optim=dict(schedule="cosine"), train=dict(steps=20))
    for step in (10, 20):
        path = folder(workdir, step) / "config/metadata"
        path.write_text(config.to_json())
    longer = replace(config, train=dict(steps=30), optim=dict(learning_rate=0.002))
    rate = 0.002 * 0.5 * (1 + math.cos(math.pi * 20 / 30))
    line = f"the cosine's learning rate at step 20 is now {rate:.3g}, and was 0; it falls to 0 at "
    assert resume.describe_changes(longer, 20)[-1] == line + "step 30"
    clipped = replace(config, optim=dict(grad_clip=1.0))
    assert len(resume.describe_changes(clipped, 20)) == 1


@pytest.mark.parametrize("before, after", [(None, 2.0), (2.0, None), (2.0, 3.0)])
def test_a_state_goes_through_a_change_of_the_clip_bit_for_bit(tmp_path, before, after):
    config = replace(run_config(tmp_path), optim=dict(grad_clip=before))
    mesh = make_mesh(config)
    state = make_state(config, mesh)
    with checkpoint.Checkpoints(config, digits()) as checkpoints:
        checkpoints.save(at_step(state, 10), {})
    changed = replace(config, optim=dict(grad_clip=after))
    restored = resume.restore(changed, mesh, 10)
    assert jax.tree.structure(restored) == jax.tree.structure(abstract_state(changed, mesh))
    for a, b in zip(jax.tree.leaves(at_step(state, 10)), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# The weights of another model


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[Path, object]:
    """A folder of awake weights that no run trained, of ten classes, and their model."""
    config = tiny_config()
    model = awaken(make_model(config, jax.random.key(5)))
    path = tmp_path_factory.mktemp("weights") / "weights"
    checkpoint.save_weights(path, model, config, tuple("abcdefghij"))
    return path, model


def from_weights(path: Path, **sections) -> Config:
    config = tiny_config(**sections)
    return replace(config, train=dict(init_from=str(path)))


def first_state(config: Config):
    mesh = make_mesh(config)
    weights = resume.load_weights(resume.find_weights(config, 0), mesh)
    return run.first_state(config, mesh, 0, weights)


def test_a_new_run_begins_with_the_averaged_weights_of_another(saved, monkeypatch, capsys):
    """On a mesh whose devices share the parameters, where the run's own would lie."""
    monkeypatch.setattr(sharding, "SMALL", 1)
    workdir, _, other = saved
    config = from_weights(workdir, mesh=dict(fsdp=4))
    begun, fresh = first_state(config), make_state(config, make_mesh(config))
    for a, b in zip(jax.tree.leaves(begun), jax.tree.leaves(fresh), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert any(len(set(leaf.sharding.spec) - {None}) for leaf in jax.tree.leaves(begun.model))
    begun, fresh, other = jax.device_put((begun, fresh, other), jax.devices()[0])
    assert largest_difference(begun.model, other.ema) == 0
    assert largest_difference(begun.ema, other.ema) == 0
    assert largest_difference(begun.opt_state, fresh.opt_state) == 0
    assert largest_difference(begun.model, fresh.model) > 1e-3
    assert begun.step == 0
    count = len(jax.tree.leaves(other.model))
    line = f"from {workdir}, checkpoint 20: {count} of {count} parameters taken; nothing fresh\n"
    assert capsys.readouterr().out == line


def test_another_number_of_classes_gets_a_new_label_table_alone(weights, capsys):
    path, model = weights
    config = from_weights(path, data=dict(num_classes=7))
    begun, fresh = first_state(config), make_state(config, make_mesh(config))
    table = "label_embed.embedding.value"
    theirs, new = leaves_by_name(model), leaves_by_name(fresh.model)
    for name, leaf in leaves_by_name(begun.model).items():
        np.testing.assert_array_equal(leaf, new[name] if name == table else theirs[name])
    out = capsys.readouterr().out
    count = len(theirs)
    words = f"{count - 1} of {count} parameters taken; label_embed.embedding fresh"
    assert out == f"from {path}, checkpoint 0: {words}\n"


def test_what_little_is_taken_of_a_model_of_another_width_is_said(weights, capsys):
    path, model = weights
    config = from_weights(path, model=dict(hidden_size=24, num_heads=3))
    begun = first_state(config)
    np.testing.assert_array_equal(begun.model.final.linear.bias, model.final.linear.bias)
    line = capsys.readouterr().out
    names = [name.removesuffix(".value") for name in leaves_by_name(model)]
    names.remove("final.linear.bias")
    words = f"final.linear.bias taken; {', '.join(names)} fresh"
    assert line == f"from {path}, checkpoint 0: {words}\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            "--model.hidden-size 24 --model.num-heads 3 --model.patch-size 4",
            "should be weights of which some fit: none has the name and the shape of one of this",
        ),
        (
            "--model.num-heads 4",
            "model.num_heads: 4 should be 5, those of train.init_from, whose attention is taken",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(refused, weights, tmp_path, flags, words):
    options = ["--train.init-from", weights[0], "--workdir", tmp_path / "run", *flags.split()]
    options += ["--train.steps", 1]
    assert words in refused(run_train, *TINY, *options)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_no_weights_is_refused_by_the_option(refused, tmp_path):
    options = ["--train.init-from", tmp_path, "--workdir", tmp_path / "run"]
    line = refused(run_train, *TINY, *options)
    words = f"train.py: train.init_from: {str(tmp_path)!r} should hold an intact checkpoint in "
    assert line.startswith(words)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_refused(weights, tmp_path):
    _, model = weights
    poisoned = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), model)
    checkpoint.save_weights(tmp_path / "x", poisoned, tiny_config(), tuple("abcdefghij"))
    with pytest.raises(InputError, match="^train.init_from: .* should be of finite weights$"):
        first_state(from_weights(tmp_path / "x"))


@pytest.mark.slow
def test_a_run_reads_its_weights_at_its_first_step_and_never_again(
    refused, weights, tmp_path, capsys
):
    """The first step of the preset has a learning rate of 0."""
    source, workdir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(weights[0], source)
    options = ["--train.init-from", source, "--workdir", workdir, "--train.steps"]
    run_train(*TINY, *options, 1)
    _, model = weights
    for ema in (True, False):
        begun, _ = checkpoint.load(workdir, ema=ema)
        assert largest_difference(begun, model) == 0
    shutil.rmtree(source)
    capsys.readouterr()
    run_train(*TINY, *options, 2)
    assert str(source) not in capsys.readouterr().out
    assert intact.steps(workdir) == [2, 1]
    line = refused(run_train, *TINY, "--workdir", workdir, "--train.steps", 3)
    assert f"train.init_from: None, where {str(source)!r} is stored in " in line


# The workdir


def test_the_workdir_is_made_and_says_what_is_trained(tmp_path):
    config = run_config(tmp_path / "a/b")
    for _ in range(2):
        resume.prepare_workdir(config, 0).close()
    names = sorted(path.name for path in (tmp_path / "a/b").iterdir())
    assert names == [".lock", "checkpoints", "config.json", "samples"]
    assert json.loads((tmp_path / "a/b/config.json").read_text()) == dataclasses.asdict(config)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^train.workdir: .* should be a folder that can be wri"):
        resume.prepare_workdir(run_config(tmp_path / "file/run"), 0)


def test_a_workdir_that_a_run_uses_is_refused_to_another_until_it_ends(tmp_path):
    program = f"""
from pathlib import Path
from dit.files import locked
with locked(Path({str(tmp_path)!r}), "x"):
    print(flush=True)
    input()
"""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes)
    process.stdout.readline()
    config = run_config(tmp_path)
    words = f"by one run at a time, and is by process {process.pid} on {socket.gethostname()}$"
    with pytest.raises(InputError, match=words):
        resume.prepare_workdir(config, 0)
    assert not (tmp_path / "config.json").exists()
    process.kill()
    process.wait()
    resume.prepare_workdir(config, 0).close()


def test_only_process_0_writes_the_config(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    resume.prepare_workdir(run_config(tmp_path), 0)
    assert not (tmp_path / "config.json").exists()
