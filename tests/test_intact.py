"""Which checkpoints are intact, and what of them is refused."""

import errno
import json
from pathlib import Path

import pytest
from conftest import (
    STEPS,
    TINY,
    digits,
    files,
    folder,
    largest_difference,
    run_config,
    run_sample,
    run_train,
    save_steps,
)

from dit import checkpoint, intact, resume
from dit.config import InputError
from dit.sharding import make_mesh
from dit.state import make_state


def seal(step_folder: Path) -> None:
    """Makes the checksums fit what is there."""
    text = json.dumps(intact.checksums(step_folder))
    (step_folder / "checksums.json").write_text(text)


def test_folders_that_are_no_finished_checkpoint_are_no_steps(copy):
    workdir, _ = copy
    for name in ("30.orbax-checkpoint-tmp", "broken-40-1", "notes", "0021", "\N{SUPERSCRIPT TWO}"):
        (workdir / "checkpoints" / name).mkdir()
    (workdir / "checkpoints" / "21").touch()
    before = files(workdir)
    assert intact.steps(workdir) == [20, 10]
    resume.prepare_workdir(run_config(workdir), 20)
    assert before.items() <= files(workdir).items()
    assert intact.steps(workdir / "nowhere") == []


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
    assert intact.newest(workdir) == (10, [line])
    with pytest.warns(UserWarning, match="using 10"):
        checkpoint.load(workdir)

    assert resume.step_to_resume(config, digits()) == (10, [line])
    assert len(list((workdir / "checkpoints").iterdir())) == 2, "nothing is written yet"
    resume.prepare_workdir(config, 10)
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert len(names) == 2
    assert names[0] == "10"
    assert names[1].startswith("broken-20-"), "the damaged one is kept, out of Orbax's sight"
    assert intact.newest(workdir) == (10, [])


def test_a_flipped_bit_in_any_file_of_any_item_is_found(copy):
    step_folder = folder(copy[0], 20)
    paths = [path for path in step_folder.glob("*/**/*") if path.is_file()]
    assert len(paths) > 10
    for path in paths:
        content = path.read_bytes()
        if content:
            harm(path, "damaged")
            expected = f"{path.relative_to(step_folder)} is damaged"
            assert intact.damage(step_folder) == expected
            path.write_bytes(content)
    assert intact.damage(step_folder) is None


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
    assert intact.newest(workdir) == (10, [line])


def test_a_file_of_an_item_that_has_no_checksum_makes_the_checkpoint_damaged(copy):
    workdir, _ = copy
    (folder(workdir, 20) / "notes.txt").touch()  # beside the items
    assert intact.damage(folder(workdir, 20)) is None
    (folder(workdir, 20) / "ema/other").touch()
    assert intact.damage(folder(workdir, 20)) == "ema/other has no checksum"
    (folder(workdir, 20) / "checksums.json").write_text("{}")
    assert intact.damage(folder(workdir, 20)).endswith(" has no checksum")
    assert intact.newest(workdir)[0] == 10


def test_a_checkpoint_that_the_disk_cannot_read_is_damaged(copy, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error", "x")

    monkeypatch.setattr(intact, "checksums", fail)
    expected = "it cannot be read: [Errno 5] Input/output error: 'x'"
    assert intact.damage(folder(copy[0], 20)) == expected


def test_without_an_intact_checkpoint_nothing_is_started_over(refused, copy):
    workdir, config = copy
    for step in STEPS:
        (folder(workdir, step) / "ema/_METADATA").unlink()
    before = files(workdir)
    with pytest.raises(InputError) as refusal:
        resume.step_to_resume(config, digits())
    assert "should hold an intact checkpoint in checkpoints/" in str(refusal.value)
    assert "(20: ema/_METADATA is missing; 10: ema/_METADATA is missing)" in str(refusal.value)
    assert "20: ema/_METADATA is missing" in refused(run_train, *TINY, "--workdir", workdir)
    assert files(workdir) == before


def test_an_empty_folder_holds_no_checkpoint_and_begins_a_run(tmp_path):
    with pytest.raises(InputError, match=r"should hold an intact .* \(train.py writes them\)"):
        intact.newest(tmp_path)
    (tmp_path / "checkpoints/10.orbax-checkpoint-tmp/ema").mkdir(parents=True)
    assert resume.step_to_resume(run_config(tmp_path), digits()) == (0, [])


# Which checkpoint a path means


def test_a_path_means_the_newest_checkpoint_or_the_one_it_names(copy):
    workdir, _ = copy
    for path, step in [
        (workdir, 20),
        (folder(workdir, 10), 10),
        (folder(workdir, 20), 20),
    ]:
        assert intact.find(path) == (workdir, step, [])
        model, _ = checkpoint.load(path)
        expected, _ = checkpoint.load(workdir, step=step)
        assert largest_difference(model, expected) == 0
    assert intact.find(workdir, 10) == intact.find(folder(workdir, 10), 10)
    harm(largest_file(folder(workdir, 20)), "missing")
    _, step, damaged = intact.find(workdir)
    assert (step, len(damaged)) == (10, 1)


def test_a_checkpoint_that_is_not_kept_or_not_intact_is_refused(copy):
    workdir, _ = copy
    words = f"^step: 15 should be one of 20, 10, which {str(workdir)!r} keeps$"
    for path, step in [(workdir, 15), (folder(workdir, 15), None), (folder(workdir, 15), 15)]:
        with pytest.raises(InputError, match=words):
            intact.find(path, step)
    path = folder(workdir, 20)
    with pytest.raises(InputError, match=f"^step: 10 should be left out: {str(path)!r} is of step"):
        intact.find(path, 10)
    (path / "ema/_METADATA").unlink()
    words = "^step: 20 should be of an intact checkpoint: in this one ema/_METADATA is missing$"
    with pytest.raises(InputError, match=words):
        intact.find(workdir, 20)
    with pytest.raises(InputError, match="^source: '.*' should hold an intact checkpoint in"):
        intact.find(workdir.parent, 20, "source")


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
    assert intact.stored_config(workdir, 20).model == config.model
    assert resume.step_to_resume(config, digits()) == (20, [])


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
        resume.step_to_resume(config, digits())
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
    assert intact.stored_metrics(workdir, 20) == {}
    path = change_json(workdir, "log", lambda values: values.update(sums))
    with pytest.raises(InputError) as refusal:
        intact.stored_metrics(workdir, 20)
    assert str(refusal.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff", b'{"commit_timestamp_nsecs": "x"}'])
def test_what_orbax_notes_beside_the_items_may_be_anything(copy, content):
    workdir, config = copy
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        note = folder(workdir, 20) / name
        note.unlink() if content is None else note.write_bytes(content)
    assert resume.step_to_resume(config, digits()) == (20, [])
    save_steps(config, make_state(config, make_mesh(config)), [20, 30])
    assert intact.steps(workdir) == [30, 20, 10]


def test_no_bit_of_the_checksums_can_be_flipped_unnoticed(copy, monkeypatch):
    step_folder = folder(copy[0], 20)
    some = dict(list(intact.checksums(step_folder).items())[:5])
    monkeypatch.setattr(intact, "checksums", lambda folder: some)
    path = step_folder / "checksums.json"
    content = json.dumps(some).encode()
    path.write_bytes(content)
    assert intact.damage(step_folder) is None
    for i in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[i] ^= 1 << bit
            path.write_bytes(flipped)
            assert intact.damage(step_folder), (i, bit)


# The layout of an older version


def test_a_checkpoint_of_an_older_version_is_refused_in_one_clear_line(refused, copy, tmp_path):
    workdir, config = copy
    for step in STEPS:
        (folder(workdir, step) / "dataset").rename(folder(workdir, step) / "position")
        seal(folder(workdir, step))
    before = files(workdir)
    words = "should be of this version: an older one wrote its checkpoints; train or convert again"
    expected = f"workdir: {str(workdir)!r} {words}"
    for read in (intact.newest, checkpoint.load):
        with pytest.raises(InputError) as refusal:
            read(workdir)
        assert str(refusal.value) == expected
    with pytest.raises(InputError, match="an older one wrote its checkpoints"):
        resume.step_to_resume(config, digits())
    assert refused(run_train, *TINY, "--workdir", workdir) == f"train.py: {expected}"
    out = tmp_path / "x.png"
    assert refused(run_sample, workdir, "--out", out) == f"sample.py: {expected}"
    assert files(workdir) == before
