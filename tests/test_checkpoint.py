import dataclasses
import errno
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, awaken, largest_difference, run_sample, run_train, tiny_config

from dit import checkpoint
from dit.config import Config, InputError, Mesh, Model, Optim, Train, replace
from dit.data import Dataset, open_dataset
from dit.sharding import make_mesh, replicated
from dit.state import State, abstract_state, make_model, make_state

STEPS = [10, 20]


def run_config(workdir: Path, **train) -> Config:
    return tiny_config(train=dict(workdir=str(workdir), **train))


def awake_state(config: Config) -> State:
    """A state whose model, average and optimizer all differ."""
    state = make_state(config, make_mesh(config))
    placements = jax.tree.map(lambda leaf: leaf.sharding, state)
    state = jax.device_put(state, jax.devices()[0])
    awake = dataclasses.replace(
        state,
        model=awaken(state.model),
        ema=awaken(state.model, seed=9),
        opt_state=jax.tree.map(lambda leaf: leaf + 3, state.opt_state),
    )
    return jax.device_put(awake, placements)


def at_step(state: State, step: int) -> State:
    return dataclasses.replace(state, step=jnp.full_like(state.step, step))


def save(config: Config, state: State, steps: list[int]) -> None:
    with checkpoint.Checkpoints(config, open_dataset(config.data)) as checkpoints:
        for step in steps:
            checkpoints.save(at_step(state, step), {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Config, State]:
    """A workdir with checkpoints 10 and 20, its config, and what both hold but for the step."""
    workdir = tmp_path_factory.mktemp("runs") / "saved"
    config = run_config(workdir)
    state = awake_state(config)
    save(config, state, STEPS)
    return workdir, config, state


@pytest.fixture
def copy(saved, tmp_path) -> tuple[Path, Config]:
    """A copy of the workdir to damage, and its config."""
    workdir = tmp_path / "copy"
    shutil.copytree(saved[0], workdir)
    return workdir, run_config(workdir)


ROOT = Path(__file__).resolve().parent.parent


def folder(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / str(step)


def files(workdir: Path) -> dict[str, bytes]:
    paths = sorted(path for path in workdir.rglob("*") if path.is_file())
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def seal(step_folder: Path) -> None:
    """Makes the checksums fit what is there."""
    text = json.dumps(checkpoint.checksums(step_folder))
    (step_folder / "checksums.json").write_text(text)


def digits() -> Dataset:
    return open_dataset(tiny_config().data)


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
    assert checkpoint.stored_config(workdir, 20) == config
    facts = {"class_names": list("0123456789"), "num_examples": 1797}
    assert checkpoint.stored_dataset(workdir, 20) == facts


def test_a_step_that_is_saved_already_is_left_alone(copy):
    workdir, config = copy
    before = files(workdir)
    save(config, make_state(config, make_mesh(config)), [20])
    after = files(workdir)
    assert {name: after[name] for name in before} == before


def test_the_last_few_and_every_nth_are_kept(saved, tmp_path):
    config = run_config(tmp_path, keep_last=2, keep_every=4)
    save(config, saved[2], [2, 4, 6, 8, 10, 12])
    assert checkpoint.steps(tmp_path) == [12, 10, 8, 4]
    for step in (4, 8, 10, 12):
        assert checkpoint.damage(folder(tmp_path, step)) is None


def test_without_keep_every_the_last_few_alone_are_kept(saved, tmp_path):
    config = run_config(tmp_path, keep_last=1, keep_every=0)
    save(config, saved[2], [2, 4, 6])
    assert checkpoint.steps(tmp_path) == [6]


def test_folders_that_are_no_finished_checkpoint_are_no_steps(copy):
    workdir, _ = copy
    for name in ("30.orbax-checkpoint-tmp", "broken-40-1", "notes", "0021", "\N{SUPERSCRIPT TWO}"):
        (workdir / "checkpoints" / name).mkdir()
    (workdir / "checkpoints" / "21").touch()
    before = files(workdir)
    assert checkpoint.steps(workdir) == [20, 10]
    checkpoint.prepare_workdir(run_config(workdir), 20)
    assert before.items() <= files(workdir).items()
    assert checkpoint.steps(workdir / "nowhere") == []


# Damage


def largest_file(step_folder: Path) -> Path:
    paths = [path for path in (step_folder / "optimizer").rglob("*") if path.is_file()]
    return max(paths, key=lambda path: path.stat().st_size)


def harm(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "damaged", "missing"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(copy, how):
    workdir, config = copy
    path = largest_file(folder(workdir, 20))
    name = path.relative_to(folder(workdir, 20))
    harm(path, how)
    line = f"checkpoint 20: {name} is {how}; using 10"
    assert checkpoint.newest_intact(workdir) == (10, [line])
    with pytest.warns(UserWarning, match="using 10"):
        checkpoint.load(workdir)

    assert checkpoint.step_to_resume(config, digits()) == (10, [line])
    assert len(list((workdir / "checkpoints").iterdir())) == 2, "nothing is written yet"
    checkpoint.prepare_workdir(config, 10)
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert len(names) == 2
    assert names[0] == "10"
    assert names[1].startswith("broken-20-"), "the damaged one is kept, out of Orbax's sight"
    assert checkpoint.newest_intact(workdir) == (10, [])


def test_a_flipped_bit_in_any_file_of_any_item_is_found(copy):
    step_folder = folder(copy[0], 20)
    paths = [path for path in step_folder.glob("*/**/*") if path.is_file()]
    assert len(paths) > 10
    for path in paths:
        content = path.read_bytes()
        if content:
            harm(path, "damaged")
            expected = f"{path.relative_to(step_folder)} is damaged"
            assert checkpoint.damage(step_folder) == expected
            path.write_bytes(content)
    assert checkpoint.damage(step_folder) is None


NO_CHECKSUMS = [None, "", '{"ema/_METADATA": [', "[]", '{"x": 3}', '{"x": [1]}', '{"x": [1, null]}']
NO_CHECKSUMS += ['{"x": [Infinity, 1]}', '{"x": "y"}']


@pytest.mark.parametrize("content", NO_CHECKSUMS)
def test_checksums_that_are_missing_or_damaged_make_the_checkpoint_damaged(copy, content):
    workdir, _ = copy
    path = folder(workdir, 20) / "checksums.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    line = "checkpoint 20: checksums.json is missing or damaged; using 10"
    assert checkpoint.newest_intact(workdir) == (10, [line])


def test_a_file_of_an_item_that_has_no_checksum_makes_the_checkpoint_damaged(copy):
    workdir, _ = copy
    (folder(workdir, 20) / "notes.txt").touch()  # beside the items
    assert checkpoint.damage(folder(workdir, 20)) is None
    (folder(workdir, 20) / "ema/other").touch()
    assert checkpoint.damage(folder(workdir, 20)) == "ema/other has no checksum"
    (folder(workdir, 20) / "checksums.json").write_text("{}")
    assert checkpoint.damage(folder(workdir, 20)).endswith(" has no checksum")
    assert checkpoint.newest_intact(workdir)[0] == 10


def test_a_checkpoint_that_the_disk_cannot_read_is_damaged(copy, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error", "x")

    monkeypatch.setattr(checkpoint, "checksums", fail)
    expected = "it cannot be read: [Errno 5] Input/output error: 'x'"
    assert checkpoint.damage(folder(copy[0], 20)) == expected


def test_without_an_intact_checkpoint_nothing_is_started_over(refused, copy):
    workdir, config = copy
    for step in STEPS:
        (folder(workdir, step) / "ema/_METADATA").unlink()
    before = files(workdir)
    with pytest.raises(InputError) as refusal:
        checkpoint.step_to_resume(config, digits())
    assert "should hold an intact checkpoint in checkpoints/" in str(refusal.value)
    assert "(20: ema/_METADATA is missing; 10: ema/_METADATA is missing)" in str(refusal.value)
    assert "20: ema/_METADATA is missing" in refused(run_train, *TINY, "--workdir", workdir)
    assert files(workdir) == before


def test_an_empty_folder_holds_no_checkpoint_and_begins_a_run(tmp_path):
    with pytest.raises(InputError, match=r"should hold an intact .* \(train.py writes them\)"):
        checkpoint.newest_intact(tmp_path)
    (tmp_path / "checkpoints/10.orbax-checkpoint-tmp/ema").mkdir(parents=True)
    assert checkpoint.step_to_resume(run_config(tmp_path), digits()) == (0, [])


# Which run may go on


def test_the_same_run_goes_on_from_its_newest_checkpoint(saved):
    workdir, config, _ = saved
    assert checkpoint.step_to_resume(config, digits()) == (20, [])
    longer = replace(config, train=dict(steps=1000, log_every=7), mesh=dict(fsdp=2))
    assert checkpoint.step_to_resume(longer, digits()) == (20, [])


def test_differences_name_field_and_both_values():
    ours = Config(model=Model(depth=4), train=Train(seed=1))
    assert checkpoint.differences(ours, Config()) == [
        "model.depth: 4, where 12 is stored",
        "train.seed: 1, where 0 is stored",
    ]
    assert checkpoint.differences(ours, ours) == []


def test_where_a_run_computes_and_keeps_its_files_may_change():
    ours = Config(
        name="x",
        model=Model(remat="full"),
        optim=Optim(accumulate=2),
        mesh=Mesh(fsdp=2),
        train=Train(steps=5, log_every=1, checkpoint_every=1, sampler="ddpm", workdir="there"),
    )
    assert checkpoint.differences(ours, Config()) == []
    here, there = Config(), Config()
    here = replace(here, data=dict(latents="here", image_size=256))
    there = replace(there, data=dict(latents="there", image_size=256, vae="vae"))
    assert checkpoint.differences(here, there) == []


def test_latents_and_pixels_are_no_one_run():
    latents = replace(Config(), data=dict(latents="here", image_size=256, channels=3))
    pixels = replace(latents, data=dict(latents=None))
    line = "input_shape: (32, 32, 4), where (256, 256, 3) is stored"
    assert checkpoint.differences(latents, pixels) == [line]


def test_the_number_of_steps_matters_to_a_cosine():
    cosine = Config(optim=Optim(schedule="cosine"))
    longer = replace(cosine, train=dict(steps=7, dtype="float32"))
    assert checkpoint.differences(longer, cosine) == [
        "train.dtype: 'float32', where 'bfloat16' is stored",
        "train.steps: 7, where 400000 is stored",
    ]


@pytest.mark.parametrize("section", ["model", "objective", "data", "optim"])
def test_every_field_that_a_step_depends_on_is_compared(section):
    may_differ = {"remat", "accumulate", "latents", "vae"}
    ours = Config()
    for field in dataclasses.fields(getattr(ours, section)):
        value = getattr(getattr(ours, section), field.name)
        theirs = replace(ours, **{section: {field.name: "another"}})
        lines = checkpoint.differences(ours, theirs)
        expected = f"{section}.{field.name}: {value!r}, where 'another' is stored"
        if field.name not in may_differ:
            assert expected in lines
        elif field.name != "latents":  # which changes the shape
            assert lines == []


def test_a_run_of_another_kind_is_refused_and_left_as_it_is(copy):
    workdir, config = copy
    harm(largest_file(folder(workdir, 20)), "damaged")
    before = files(workdir)
    with pytest.raises(InputError) as refusal:
        checkpoint.step_to_resume(replace(config, optim=dict(learning_rate=0.5)), digits())
    line = str(refusal.value)
    assert line.startswith("optim.learning_rate: 0.5, where 0.001 is stored in ")
    assert line.endswith("so set it back or choose another --name")
    assert files(workdir) == before, "not even the damaged checkpoint is renamed"


def test_a_run_on_other_data_is_refused(saved):
    _, config, _ = saved
    few = Dataset([0] * 5, tuple("0123456789"))
    with pytest.raises(InputError, match="data: 5 images, where the run was trained on 1797"):
        checkpoint.step_to_resume(config, few)


# What is stored, when it is not as written


def change_json(workdir: Path, item: str, change) -> Path:
    """Changes the JSON of an item of both checkpoints, whose checksums then fit."""
    for step in STEPS:
        path = folder(workdir, step) / item / "metadata"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        seal(folder(workdir, step))
    return path


def test_a_config_from_before_a_field_was_added_is_loaded_and_resumed(copy):
    workdir, config = copy
    change_json(workdir, "config", lambda values: values["model"].pop("mlp_ratio"))
    assert checkpoint.stored_config(workdir, 20).model == config.model
    assert checkpoint.step_to_resume(config, digits()) == (20, [])


CONFIG_CHANGES = [
    (lambda values: values["model"].update(width=3), "model.width: 3 should be left out"),
    (lambda values: values["model"].update(depth="2"), "model.depth: '2' should be of type int"),
    (lambda values: values.update(data=None), "data: None should be an object of fields"),
    (lambda values: values["optim"].update(beta1=float("nan")), "optim.beta1: nan should be a fin"),
    (lambda values: values["model"].update(num_heads=3), "model.hidden_size: 20 should be a mult"),
    (lambda values: values["data"].update(image_size=10**9), "data.image_size: 1000000000 should"),
]


@pytest.mark.parametrize("change, words", CONFIG_CHANGES)
def test_a_stored_config_that_cannot_be_is_refused_by_its_file_and_field(
    refused, copy, tmp_path, change, words
):
    workdir, _ = copy
    path = change_json(workdir, "config", change)
    before = files(workdir)
    line = refused(run_sample, workdir, "--out", tmp_path / "x.png")
    assert line.startswith(f"sample.py: {path}: {words}")
    line = refused(run_train, *TINY, "--workdir", workdir)
    assert line.startswith(f"train.py: {path}: {words}")
    assert files(workdir) == before


FACTS_CHANGES = [
    (lambda facts: facts.pop("class_names"), "['num_examples'] should be class_names and num_exa"),
    (lambda facts: facts.update(more=3), "['class_names', 'more', 'num_examples'] should be"),
    (lambda facts: facts["class_names"].pop(), "class_names: ['0', '1', '2', '3', '4', '5', '6',"),
    (lambda facts: facts.update(class_names=list(range(10))), "class_names: [0, 1, 2, 3, 4, 5, 6"),
    (lambda facts: facts.update(class_names=None), "class_names: None should be the names of 10"),
    (lambda facts: facts.update(num_examples="many"), "num_examples: 'many' should be of type int"),
    (lambda facts: facts.update(num_examples=-1), "num_examples: -1 should be more than 0"),
]


@pytest.mark.parametrize("change, words", FACTS_CHANGES)
def test_facts_of_a_data_set_that_cannot_be_are_refused_by_their_file(copy, change, words):
    workdir, config = copy
    path = change_json(workdir, "dataset", change)
    with pytest.raises(InputError) as refusal:
        checkpoint.step_to_resume(config, digits())
    assert str(refusal.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize(
    "sums, words",
    [
        ({"steps": -1, "loss": 3.0}, "steps: -1 should be more than 0"),
        ({"steps": 2, "loss": "3"}, "loss: '3' should be of type float"),
        ({"steps": 2, "loss": float("nan")}, "loss: nan should be a finite number"),
        ({"loss": 3.0}, "{'loss': 3.0} should be sums of metrics and their steps"),
    ],
)
def test_sums_of_metrics_that_cannot_be_are_refused_by_their_file(copy, sums, words):
    workdir, _ = copy
    assert checkpoint.stored_metrics(workdir, 20) == {}
    path = change_json(workdir, "log", lambda values: values.update(sums))
    with pytest.raises(InputError) as refusal:
        checkpoint.stored_metrics(workdir, 20)
    assert str(refusal.value).startswith(f"{path}: {words}")


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
def test_arrays_that_orbax_cannot_read_are_refused_in_one_line(copy, capfd, name):
    workdir, _ = copy
    (folder(workdir, 20) / "ema" / name).write_text("{}")
    seal(folder(workdir, 20))
    with pytest.raises(InputError, match=f"^{folder(workdir, 20)}/ema: ") as refusal:
        checkpoint.load(workdir)
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff", b'{"commit_timestamp_nsecs": "x"}'])
def test_what_orbax_notes_beside_the_items_may_be_anything(copy, content):
    workdir, config = copy
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        note = folder(workdir, 20) / name
        note.unlink() if content is None else note.write_bytes(content)
    assert checkpoint.step_to_resume(config, digits()) == (20, [])
    save(config, make_state(config, make_mesh(config)), [20, 30])
    assert checkpoint.steps(workdir) == [30, 20, 10]


def test_no_bit_of_the_checksums_can_be_flipped_unnoticed(copy, monkeypatch):
    step_folder = folder(copy[0], 20)
    some = dict(list(checkpoint.checksums(step_folder).items())[:5])
    monkeypatch.setattr(checkpoint, "checksums", lambda folder: some)
    path = step_folder / "checksums.json"
    content = json.dumps(some).encode()
    path.write_bytes(content)
    assert checkpoint.damage(step_folder) is None
    for i in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[i] ^= 1 << bit
            path.write_bytes(flipped)
            assert checkpoint.damage(step_folder), (i, bit)


# The layout of an older version


def test_a_checkpoint_of_an_older_version_is_refused_in_one_clear_line(refused, copy, tmp_path):
    workdir, config = copy
    for step in STEPS:
        (folder(workdir, step) / "dataset").rename(folder(workdir, step) / "position")
        seal(folder(workdir, step))
    before = files(workdir)
    words = "should be of this version: an older one wrote its checkpoints; train or convert again"
    expected = f"workdir: {str(workdir)!r} {words}"
    for read in (checkpoint.newest_intact, checkpoint.load):
        with pytest.raises(InputError) as refusal:
            read(workdir)
        assert str(refusal.value) == expected
    with pytest.raises(InputError, match="an older one wrote its checkpoints"):
        checkpoint.step_to_resume(config, digits())
    assert refused(run_train, *TINY, "--workdir", workdir) == f"train.py: {expected}"
    out = tmp_path / "x.png"
    assert refused(run_sample, workdir, "--out", out) == f"sample.py: {expected}"
    assert files(workdir) == before


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
    assert checkpoint.newest_intact(path) == (0, [])
    facts = {"class_names": list("abcdefghij"), "num_examples": None}
    assert checkpoint.stored_dataset(path, 0) == facts
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
        checkpoint.step_to_resume(replace(config, train=dict(workdir=str(path))), digits())
    line = refused(run_train, *TINY, "--workdir", path)
    assert line.startswith(
        f"train.py: train.workdir: {str(path)!r} should be a run's folder or new"
    )
    assert files(path) == before


# The workdir


def test_the_workdir_is_made_and_says_what_is_trained(tmp_path):
    config = run_config(tmp_path / "a/b")
    for _ in range(2):
        checkpoint.prepare_workdir(config, 0).close()
    names = sorted(path.name for path in (tmp_path / "a/b").iterdir())
    assert names == [".lock", "checkpoints", "config.json", "samples"]
    assert json.loads((tmp_path / "a/b/config.json").read_text()) == dataclasses.asdict(config)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^train.workdir: .* should be a folder that can be wri"):
        checkpoint.prepare_workdir(run_config(tmp_path / "file/run"), 0)


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
        checkpoint.prepare_workdir(config, 0)
    assert not (tmp_path / "config.json").exists()
    process.kill()
    process.wait()
    checkpoint.prepare_workdir(config, 0).close()


def test_only_process_0_writes_the_config(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    checkpoint.prepare_workdir(run_config(tmp_path), 0)
    assert not (tmp_path / "config.json").exists()
