"""Files and folders that are written whole, and folders that one request resumes."""

import json

import pytest

from dit.config import InputError
from dit.files import claim_folder, naming, read_json, whole

REQUEST = {"size": 32, "classes": (1, 2), "vae": None}


@pytest.mark.parametrize("is_folder", [False, True])
def test_nothing_is_at_the_name_before_the_writer_is_done(tmp_path, is_folder):
    path = tmp_path / "x.npz"
    with whole(path) as unfinished:
        if is_folder:
            unfinished.mkdir()
            (unfinished / "a").write_text("a")
        else:
            unfinished.write_text("a")
        assert not path.exists()
    assert (path / "a" if is_folder else path).read_text() == "a"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_raises_leaves_nothing_at_the_name_and_the_old_file_as_it_was(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(KeyError), whole(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert not path.exists()
    path.write_text("old")
    with pytest.raises(KeyError), whole(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert path.read_text() == "old"


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_file_is_written_over_what_a_killed_writer_left(tmp_path, is_folder):
    leftover = tmp_path / "x.tmp"
    if is_folder:
        (leftover / "half").mkdir(parents=True)
    else:
        leftover.write_text("longer than what follows")
    with whole(tmp_path / "x") as unfinished:
        unfinished.write_text("a")
    assert (tmp_path / "x").read_text() == "a"
    assert not leftover.exists()


def test_a_folder_is_begun_anew_where_a_killed_writer_left_one(tmp_path):
    (tmp_path / "x.tmp" / "half").mkdir(parents=True)
    with whole(tmp_path / "x") as unfinished:
        unfinished.mkdir()
        (unfinished / "a").touch()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]
    assert not (tmp_path / "x.tmp").exists()


# What no JSON object looks like: each has raised an error of its own
NO_OBJECTS = [b"", b"{", b"[1]", b"3", b"null", b"\xff", b"9" * 5000, b"[" * 100_000]


@pytest.mark.parametrize("content", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
def test_a_file_that_is_no_json_object_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_json(path, "a list of wishes")
    assert str(refusal.value).startswith(f"{path}: ")
    assert "should be a list of wishes" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_json_object_is_read_and_a_missing_one_refused(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(InputError, match="x.json: should be a JSON object .*No such file"):
        read_json(path)
    path.write_text('{"a": [1, null]}')
    assert read_json(path) == {"a": [1, None]}


def test_a_refusal_of_what_a_file_holds_names_the_file(tmp_path):
    with pytest.raises(InputError, match="^x.json: a: 3 should be 4$"), naming("x.json"):
        raise InputError("a: 3 should be 4")


def test_the_same_request_goes_on_in_its_folder(tmp_path):
    folder = tmp_path / "deep" / "parts"
    claim_folder(folder, REQUEST, "--out")
    assert json.loads((folder / "request.json").read_text()) == {**REQUEST, "classes": [1, 2]}
    (folder / "part").write_text("a")
    claim_folder(folder, REQUEST, "--out")
    assert sorted(path.name for path in folder.iterdir()) == ["part", "request.json"]


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(size=64), "with size 32 rather than 64"),
        (dict(classes=(1, 3)), "with classes [1, 2] rather than [1, 3]"),
        (dict(steps=3), "with steps None rather than 3"),
    ],
)
def test_another_request_is_refused_by_the_first_setting_that_differs(tmp_path, changed, words):
    folder = tmp_path / "parts"
    claim_folder(folder, REQUEST, "--out")
    with pytest.raises(InputError) as refusal:
        claim_folder(folder, REQUEST | changed, "--out")
    expected = f"--out: {str(folder)!r} was begun {words}; remove it, or name another folder"
    assert str(refusal.value) == expected


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    claim_folder(tmp_path, REQUEST, "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["request.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "[" * 100_000, None])
def test_a_folder_that_is_damaged_or_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "other").write_text("kept")
    if content is not None:
        (tmp_path / "request.json").write_text(content)
    with pytest.raises(InputError, match="should be new, or hold the request.json") as refusal:
        claim_folder(tmp_path, REQUEST, "--out")
    assert str(refusal.value).startswith(f"--out: {str(tmp_path)!r}")
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "other").read_text() == "kept"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out: "):
        claim_folder(tmp_path / "file" / "parts", REQUEST, "--out")
