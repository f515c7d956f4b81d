"""Every command of the READMEs is accepted, and those of the first one also do what they say."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    awake_state,
    run_config,
    run_sample,
    run_train,
    save_steps,
    tiny_model,
    write_vae,
)
from PIL import Image
from safetensors.numpy import load_file
from test_convert import convert_command
from test_fid import fid_command, weights  # noqa: F401
from test_folder import write_folder
from test_latents import latents_command
from test_plan import run_plan

from dit import cli, identity
from dit.imagenet.official import to_official
from dit.imagenet.tensors import write_tensors
from dit.model import BLOCKS

ROOT = Path(__file__).resolve().parent.parent
READMES = {path: (ROOT / path).read_text() for path in ("README.md", "benchmarks/README.md")}

# Runs commands until their options are parsed, and prints [command, status] of each
PARSE = """
import json, runpy, sys
from dit import cli

depth = 0

def until_parsed(parse):
    def stopping(*args, **kwargs):
        global depth
        depth += 1
        try:
            result = parse(*args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:
            raise SystemExit(0)
        return result
    return stopping

for name in ("parse", "parse_config"):
    setattr(cli, name, until_parsed(getattr(cli, name)))

root, commands = sys.argv[1], json.loads(sys.argv[2])
for words in commands:
    flag, *rest = words
    sys.argv = [rest[0], *rest[1:]] if flag == "-m" else [flag, *rest]
    status = "not parsed"
    try:
        if flag == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(root + "/benchmarks"))
            runpy.run_path(root + "/" + flag, run_name="__main__")
    except SystemExit as end:
        status = end.code
    print(json.dumps([words, status]))
"""


def commands(text: str) -> list[list[str]]:
    """The words behind `python` of each command: of blocks without a language, and in backticks.

    Left out are names of programs alone, and commands with a word in capitals, which a reader
    replaces.
    """
    blocks = re.findall(r"^```(.*)\n((?s:.*?))^```", text, re.M)
    shown = "".join(block for language, block in blocks if language == "")
    lines = shown.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += re.findall(r"`(python [^`]+)`", prose)
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    return [
        words
        for _, *words in found
        if len(words) > 1 + (words[0] == "-m")
        if not any(re.fullmatch("[A-Z]+", word) for word in words)
    ]


def commands_of(*programs: str) -> list[list[str]]:
    """The commands of README.md that run one of these programs."""
    found = [words[words[0] == "-m" :] for words in commands(READMES["README.md"])]
    return [words for words in found if words[0] in programs and "--help" not in words]


def own_config() -> str:
    """The README's file that defines a config."""
    return re.findall(r"^```python\n(from flax.*?)^```", READMES["README.md"], re.M | re.S)[0]


@pytest.mark.slow
def test_the_commands_are_accepted(tmp_path):
    found = [words for text in READMES.values() for words in commands(text)]
    assert len(found) > 40
    (tmp_path / "my_config.py").write_text(own_config())
    program = [sys.executable, "-c", PARSE, ROOT, json.dumps(found)]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(program, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    statuses = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("[")]
    assert len(statuses) == len(found)
    refused = [shlex.join(words) for words, status in statuses if status != 0]
    assert refused == [], answer.stderr


def test_what_is_drawn_of_the_digits_is_drawn_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run_config(Path("runs/digits"))
    save_steps(config, awake_state(config), [1000, 2000])
    wanted = [argv for _, *argv in commands_of("sample.py") if argv[0] == "runs/digits"]
    assert len(wanted) >= 5
    for argv in wanted:
        run_sample(*argv)
        out = Path("runs/digits") / argv[argv.index("--out") + 1]
        picture = Image.open(out)
        assert np.asarray(picture.convert("L")).std() > 10
        assert (getattr(picture, "n_frames", 1) > 1) == (out.suffix == ".gif")
        out.unlink()


def official() -> dict[str, np.ndarray]:
    """The tensors of a published file, but for the model's width and depth."""
    sizes = dict(input_size=32, patch_size=2, in_channels=4, depth=1, num_classes=1000)
    return {name: np.asarray(a) for name, a in to_official(tiny_model(**sizes)).items()}


@pytest.fixture
def what_is_asked_for(tmp_path, monkeypatch):
    """A folder with the pictures, weights and config that the README's commands are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dit.model.BLOCKS", dict(BLOCKS))
    Path("my_config.py").write_text(own_config())
    write_folder(Path("path/to/pictures"), heron=11, wren=7)
    write_folder(Path("path/to/imagenet/train"), fish=5, owl=3)
    write_folder(Path("photos"), me=5, you=3)
    write_vae(Path("vae"))
    write_tensors(Path("dit.safetensors"), official())
    convert_command("dit.safetensors", "weights/xl2", "--num-heads", 5)


def smaller(program: str, *argv: str) -> list[str]:
    """A command of the README, and behind its own words what makes it one of seconds."""
    if program == "dit.imagenet.latents":
        return [*argv, "--batch-size", "1"]
    if program == "sample.py":
        fewer = ["--num-samples", "5"] if "--num-samples" in argv else []
        return [*argv, "--steps", "2", *fewer]
    flags = "--model.hidden-size 20 --model.depth 1 --model.num-heads 5"
    if program == "dit.identity":
        return [*argv, *flags.split()]
    flags += " --train.batch-size 16 --train.steps 1 --train.sample-steps 2"
    if argv[0].startswith("cifar10"):  # which is not everywhere, as flowers are not
        flags += " --data.name path/to/pictures"
    if argv[0].startswith("imagenet"):
        flags += " --data.latent-scale 0.7"  # of a random VAE
        flags += " --data.num-classes 2" if "--data.name" not in argv else ""
    return [*argv, *flags.split()]


def identity_command(*argv):
    assert identity.run(cli.parse_config(list(argv), "dit.identity", "")) == 0


@pytest.mark.slow
def test_what_is_encoded_trained_and_sampled_is_so_as_written(what_is_asked_for, capsys):
    run = {
        "dit.imagenet.latents": latents_command,
        "dit.identity": identity_command,
        "train.py": run_train,
        "train": run_train,
        "sample.py": run_sample,
    }
    found = [words for words in commands_of(*run) if words[1] != "runs/digits"]  # drawn above
    found.sort(key=lambda words: words[0] != "dit.imagenet.latents")
    assert len(found) >= 17
    for program, *argv in found:
        run[program](*smaller(program, *argv))
    trained = {path.parts[1] for path in Path("runs").glob("*/checkpoints/1")}
    presets = {"digits", "cifar10", "cifar10_tiny", "imagenet256_xl2"}
    assert trained == presets | {"parallel", "second_try", "mine", "flowers", "photos", "xl2_flow"}
    line = "20 of 21 parameters taken; label_embed.embedding fresh"
    assert line in capsys.readouterr().out
    drawn = "weights/xl2/x.png", "runs/cifar10/samples.npz", "runs/imagenet256_xl2/x.npz"
    assert all(Path(path).stat().st_size for path in drawn)


@pytest.mark.parity
def test_the_published_files_are_read_as_written(weights, tmp_path, monkeypatch, capsys):  # noqa: F811
    import torch

    def torch_file(name: str, arrays: dict[str, np.ndarray]) -> None:
        torch.save({name: torch.tensor(a) for name, a in arrays.items()}, name)

    monkeypatch.chdir(tmp_path)
    [(_, file, folder)] = commands_of("dit.imagenet.convert")
    torch_file(file, official())
    convert_command(file, folder, "--num-heads", 5)
    [(_, *argv)] = [argv for argv in commands_of("sample.py") if argv[1] == folder]
    write_vae(Path("vae"))
    run_sample(*argv, "--steps", "2")
    assert np.asarray(Image.open(Path(folder) / "x.png")).std() > 10

    [(_, samples, *argv)] = commands_of("dit.imagenet.fid")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    for path in Path(samples), Path(argv[argv.index("--reference") + 1]):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, arr_0=images)
    torch_file(argv[argv.index("--inception") + 1], load_file(weights))
    fid_command(samples, *argv)
    assert re.search(r"fid +-?0\.0", capsys.readouterr().out)


@pytest.mark.parity
def test_the_plan_is_made_as_written(capsys):
    [(_, *argv)] = commands_of("plan.py")
    assert run_plan(*argv) == 0
    assert "as it is: it fits" in capsys.readouterr().out


def test_the_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {name for text in READMES.values() for name in re.findall(r"'\.\[(\w+)\]'", text)}
    assert named and named <= set(project["optional-dependencies"])


def test_the_files_exist():
    for path, text in READMES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / path).parent / target).exists(), target
