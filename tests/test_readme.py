"""Every command that a README shows is one that its program accepts; those on digits also draw."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
from conftest import awake_state, run_config, run_sample, save_steps
from PIL import Image

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

for name in ("parse", "parse_preset", "parse_config"):
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

    Left out are names of programs alone, commands with a word in capitals, which a reader replaces,
    and plan.py --table, which needs its compilers.
    """
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += re.findall(r"`(python [^`]+)`", prose)
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    return [
        words
        for _, *words in found
        if len(words) > 1 + (words[0] == "-m") and "--table" not in words
        if not any(re.fullmatch("[A-Z]+", word) for word in words)
    ]


def test_the_commands_are_accepted(tmp_path):
    found = [words for text in READMES.values() for words in commands(text)]
    assert len(found) > 30
    own = r"^```python\n(from flax import nnx.*?)^```"
    (tmp_path / "my_config.py").write_text(re.findall(own, READMES["README.md"], re.M | re.S)[0])
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
    wanted = [words for words in commands(READMES["README.md"]) if words[0] == "sample.py"]
    wanted = [argv for _, *argv in wanted if argv[0] == "runs/digits"]
    assert len(wanted) >= 5
    for argv in wanted:
        run_sample(*argv)
        out = Path("runs/digits") / argv[argv.index("--out") + 1]
        picture = Image.open(out)
        assert np.asarray(picture.convert("L")).std() > 10
        assert (getattr(picture, "n_frames", 1) > 1) == (out.suffix == ".gif")
        out.unlink()


def test_the_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {name for text in READMES.values() for name in re.findall(r"'\.\[(\w+)\]'", text)}
    assert named and named <= set(project["optional-dependencies"])


def test_the_files_exist():
    for path, text in READMES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / path).parent / target).exists(), target
