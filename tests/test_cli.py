import ast
import dataclasses
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import pytest
import tyro
from conftest import run_sample, run_train, tiny_config

from dit import checkpoint, cli
from dit.config import (
    Config,
    Diverged,
    InputError,
    PositiveInt,
    Probability,
    Stopped,
    Unsaved,
    nearest,
    replace,
)
from dit.signals import SIGNALS, StopRequest
from dit.state import make_model

ROOT = Path(__file__).resolve().parent.parent

FID_ARGUMENTS = ["x.npz", "--reference", "digits", "--inception", "x.pth"]
COMMANDS = {  # how each command is called, with the arguments that it cannot do without
    "train.py": ["digits"],
    "sample.py": ["runs/digits"],
    "plan.py": ["digits"],
    "-m dit.identity": ["digits"],
    "-m dit.imagenet.fid": FID_ARGUMENTS,
    "-m dit.imagenet.latents": ["imagenet2012", "--vae", "x", "--out", "y"],
    "-m dit.imagenet.convert": ["x.pt", "y"],
}


@pytest.fixture
def without_jax(tmp_path):
    """Runs `python *argv` where importing jax fails."""
    (tmp_path / "no_jax").mkdir()
    (tmp_path / "no_jax/jax.py").write_text('raise ImportError("jax was imported")')
    path = [str(tmp_path / "no_jax"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}

    def run(*argv) -> subprocess.CompletedProcess:
        command = [sys.executable, *[str(a) for a in argv]]
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)

    return run


# Before jax is imported


def test_the_stand_in_for_jax_is_found(without_jax):
    assert "jax was imported" in without_jax("-c", "import jax").stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_answered_without_jax(without_jax, command):
    answer = without_jax(*command.split(), "--help")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith("usage: ")
    for word in command.split():
        assert word in answer.stdout.splitlines()[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_typo_is_answered_in_one_line_without_jax(without_jax, command):
    answer = without_jax(*command.split(), *COMMANDS[command], "--stpes", "3")
    assert (answer.returncode, answer.stdout) == (2, "")
    lines = answer.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(command.removeprefix("-m ") + ": Unrecognized options: --stpes")
    assert "--help)" in lines[0]


@pytest.mark.parametrize("command", ["train.py", "plan.py", "-m dit.identity"])
def test_fields_that_do_not_go_together_are_refused_without_jax(without_jax, command):
    answer = without_jax(*command.split(), "digits", "--model.num-heads", "3")
    words = "model.hidden_size: 128 should be a multiple of num_heads = 3"
    name = command.removeprefix("-m ")
    assert (answer.returncode, answer.stderr) == (2, f"{name}: {words}\n")


@pytest.mark.parametrize(
    "command, argv, name",
    [
        ("train.py", ["digits", "--workdir"], "train.workdir"),
        ("plan.py", ["digits", "--workdir"], "train.workdir"),
        ("sample.py", [], "workdir"),
        ("sample.py", ["runs/digits", "--out"], "--out"),
        ("-m dit.imagenet.latents", ["imagenet2012", "--vae", "x", "--out"], "--out"),
        ("-m dit.imagenet.fid", [*FID_ARGUMENTS, "--save-reference"], "--save-reference"),
    ],
)
def test_a_bucket_is_refused_without_jax_and_not_made_as_a_folder(without_jax, command, argv, name):
    answer = without_jax(*command.split(), *argv, "gs://bucket/x.npz")
    expected = "should be a path of this host's file system, not of a bucket"
    line = f"{command.removeprefix('-m ')}: {name}: 'gs://bucket/x.npz' {expected}\n"
    assert (answer.returncode, answer.stderr) == (2, line)
    assert not (ROOT / "gs:").exists()


def test_sample_holds_its_options_against_the_stored_run_without_jax(without_jax, tmp_path):
    config = tiny_config()
    model = make_model(config, jax.random.key(0))
    weights = tmp_path / "weights"
    checkpoint.save_weights(weights, model, config, tuple("0123456789"))
    answer = without_jax("sample.py", weights, "--classes", "10")
    expected = "sample.py: --classes: 10 should be from 0 to 9: the model has 10 classes\n"
    assert (answer.returncode, answer.stderr) == (2, expected)
    answer = without_jax("sample.py", weights, "--steps", "102")
    expected = "sample.py: --steps: 102 should be from 1 to the model's 101 timesteps\n"
    assert (answer.returncode, answer.stderr) == (2, expected)
    answer = without_jax("sample.py", tmp_path)
    assert answer.returncode == 2
    assert "should hold an intact checkpoint" in answer.stderr


def test_the_library_has_its_presets_without_jax(without_jax):
    answer = without_jax("-c", "import dit; print(dit.preset('digits').name)")
    assert (answer.stdout, answer.stderr) == ("digits\n", "")
    assert "jax was imported" in without_jax("-c", "import dit; dit.DiT").stderr


def test_help_documents_every_field(without_jax):
    answer = without_jax("train.py", "digits", "--help").stdout
    text = " ".join(answer.replace("│", " ").split())
    for section in dataclasses.fields(Config):
        if section.name == "name":
            continue
        for field in dataclasses.fields(section.default_factory):
            flag = f"--{section.name}.{field.name}".replace("_", "-")
            behind = re.split(rf"{flag}[ ,]", text, maxsplit=1)[1]
            described = behind.split("(default:")[0].split("} ")[-1]
            words = re.sub(r"^.*?([a-z`])", r"\1", described)
            assert len(words.split()) >= 2, flag


# Presets


def test_presets_go_by_the_names_of_their_files():
    names = cli.preset_names()
    assert {"digits", "cifar10", "imagenet256_xl2"} <= set(names)
    assert names == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert cli.load_preset("digits") == cli.load_preset(str(ROOT / "configs/digits.py"))


def test_presets_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.load_preset("digits").name == "digits"


def test_help_names_the_presets(without_jax):
    answer = " ".join(without_jax("train.py", "--help").stdout.split())
    assert f"Presets: {', '.join(cli.preset_names())}." in answer


@pytest.mark.slow
def test_a_command_of_the_package_runs_in_any_folder(tmp_path):
    tiny = "--model.hidden-size 20 --model.depth 2 --model.num-heads 5".split()
    command = [sys.executable, "-m", "dit.identity", "digits", *tiny]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "every one of the 2 blocks is the identity, bit for bit" in answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_changes_the_preset():
    argv = "digits --train.batch-size 64 --workdir here --data.flip True --train.keep-every 7"
    config = cli.parse_config(argv.split(), "train.py", "")
    digits = cli.load_preset("digits")
    changed = dict(batch_size=64, workdir="here", keep_every=7)
    assert config.train == dataclasses.replace(digits.train, **changed)
    assert config.data == dataclasses.replace(digits.data, flip=True)
    assert config.model == digits.model


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "from dit.config import *\nconfig = Config(model=Model(hiden_size=3))",
            "unexpected keyword argument 'hiden_size'",
        ),
        ("config = 3", "config: 3 should be a Config(...)"),
        ("", "config: None should be a Config(...)"),
        ("config = (", "was never closed"),
        ("config = 1 / 0", "ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("from dit.config import *\nconfig = Config(model=Train())", "model: Train("),
        (
            "from dit.config import *\nconfig = Config(train=Train(steps='3'))",
            "train.steps: '3' should be of type int",
        ),
        (
            "from dit.config import *\nconfig = Config(model=Model(remat=None))",
            "model.remat: None should be one of none, dots, full",
        ),
    ],
)
def test_a_config_file_that_cannot_be_is_refused_in_one_line(refused, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    assert words in refused(run_train, tmp_path / "mine.py")


def test_a_config_file_is_run_once_and_again_when_it_has_changed(refused, tmp_path):
    """A TFDS builder in it is registered once, and an error after that stays the one told of."""
    path, runs = tmp_path / "mine.py", tmp_path / "runs"
    count = f"open({str(runs)!r}, 'a').write('x')\n"
    path.write_text(count + "from dit.config import *\nconfig = Config(name='one')")
    assert not cli.joins_hosts([str(path)])
    assert cli.load_preset(str(path)).name == "one"
    assert runs.read_text() == "x"
    path.write_text(count + "config = nothing")
    os.utime(path, ns=(1, 1))
    for _ in range(2):
        assert "NameError: name 'nothing' is not defined" in refused(run_train, path)
    assert runs.read_text() == "xx"


def test_a_config_file_imports_what_lies_beside_it_and_it_hides_no_package(tmp_path):
    (tmp_path / "lies_beside.py").write_text("NAME = 'beside'")
    (tmp_path / "tabnanny.py").write_text("raise ImportError('hidden')")
    text = "import tabnanny\nfrom lies_beside import NAME\nfrom dit.config import Config\n"
    (tmp_path / "mine.py").write_text(text + "config = Config(name=NAME)")
    assert cli.load_preset(str(tmp_path / "mine.py")).name == "beside"


# Command lines


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["cifar100"],
            "preset: 'cifar100' is neither a preset nor a Python file; "
            "the nearest is 'cifar10'; presets are cifar10, cifar10_flow, ",
        ),
        (
            ["digits", "--model.hiden-size", "3"],
            "--model.hiden-size, 3; the nearest is '--model.hidden-size' (see",
        ),
        (
            ["digits", "--train.steps", "ten"],
            "Error parsing --train.steps: invalid literal for int() with base 10: 'ten'",
        ),
        (
            ["digits", "--train.dtype", "float16"],
            "invalid choice 'float16' for argument '--train.dtype'",
        ),
        (["digits", "--train.steps"], "Missing value for argument '--train.steps'"),
        (["digits", "--train.steps", "0"], "train.steps: 0 should be more than 0"),
        ([], "preset: missing; it should come first, one of cifar10, cifar10_flow, cifar10_tiny"),
        (["nowhere.py"], "preset: 'nowhere.py' should be a file, and there is none"),
        (["trian.py"], "should be a file, and there is none; the nearest is 'train.py'"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused_in_one_line(refused, argv, words):
    line = refused(run_train, *argv)
    assert line.startswith("train.py: ")
    assert words in line
    assert not re.search("[╭─╮│╰╯]", line)


@dataclass(frozen=True)
class Options:
    size: PositiveInt = 3  # of it
    share_kept: Probability | None = None  # of it
    kind: Literal["a", "b"] = "a"  # of it
    draws: bool = True  # or not


def parse(text: str) -> Options:
    return cli.parse(Options, text.split(), "x.py", "What it is.")


def test_options_come_from_a_dataclass_and_keep_to_its_ranges():
    assert parse("") == Options()
    assert parse("--size 4 --share-kept 0.5 --kind b --no-draws") == Options(4, 0.5, "b", False)
    for text in ("--draws False", "--draws=False", "--no-draws", "--draws --draws False"):
        assert not parse(text).draws
    assert parse("--draws True --size 5") == parse("--draws --size 5") == Options(5)
    with pytest.raises(InputError, match="^--size: 0 should be more than 0$"):
        parse("--size 0")
    with pytest.raises(InputError, match="^--share-kept: 1.5 should be a probability, from 0 to"):
        parse("--share-kept 1.5")


@pytest.mark.parametrize("flip", ["--data.flip", "--data.flip True", "--data.flip=True"])
def test_booleans_of_a_preset_are_spelled_as_those_of_any_command(flip):
    config = cli.parse_config(f"digits {flip} --name True".split(), "train.py", "")
    assert config.data.flip
    assert config.name == "True", "which is no boolean"
    line = f"digits {flip} --data.no-flip"
    assert not cli.parse_config(line.split(), "train.py", "").data.flip


@pytest.mark.parametrize(
    "text, joins",
    [
        ("--mesh.distributed", True),
        ("--mesh.distributed True", True),
        ("--distributed --classes 3", True),
        ("--mesh.distributed=False", False),
        ("--mesh.no-distributed", False),
        ("--no-distributed", False),
        ("", False),
    ],
)
def test_a_command_line_says_whether_hosts_are_joined(text, joins):
    assert cli.joins_hosts(["digits", *text.split()]) == joins


@pytest.mark.parametrize(
    "word, names, hint",
    [
        ("digist", ["cifar10", "digits"], "; the nearest is 'digits'"),
        ("CIFAR_10", ["cifar10", "digits"], "; the nearest is 'cifar10'"),
        ("three", list("0123456789"), ""),
        ("my_images/", ["open_images_v4", "digits"], ""),
    ],
)
def test_only_a_name_that_is_near_is_suggested(word, names, hint):
    assert nearest(word, names) == hint


OPTIONS = """Command Config Model Objective Data Optim Mesh Train Eval Sample Plan Fid MakeLatents
    Convert Options""".split()
PARTS = "of or and by in for to with such than that which at from on none timed drawn".split()


def test_a_help_text_is_understood_without_its_neighbours():
    """It is there, and does not begin in the middle of a sentence."""
    seen = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("dit/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or node.name not in OPTIONS:
                continue
            seen.add(node.name)
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            texts = {field.target.id: lines[field.end_lineno - 1] for field in fields}
            for name, line in texts.items():
                if "default_factory" in line or 'name=""' in line:  # a section
                    continue
                above = lines[lines.index(line) - 1].strip()
                comment = line.partition("  # ")[2] or above.removeprefix("# ")
                first = comment.split()[0] if comment else "of"
                assert first.lower().strip("`,;:") not in PARTS, f"{path.name} {name}: {comment}"
    assert seen == set(OPTIONS)


def test_a_presets_own_fields_and_other_options_stand_side_by_side():
    @dataclass(frozen=True)
    class Both:
        config: Annotated[Config, tyro.conf.arg(name="")]
        topology: str | None = None

    argv = "digits --topology v5e:2x4 --train.steps 7".split()
    both = cli.parse_config(argv, "x.py", "", Both)
    expected = replace(cli.load_preset("digits"), train=dict(steps=7))
    assert (both.config, both.topology) == (expected, "v5e:2x4")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/x"])
def test_a_run_has_the_name_of_a_folder(refused, name):
    line = refused(run_train, "digits", "--name", name)
    assert f"--name: {name!r} should be the name of a folder in runs/, not a path" in line
    config = cli.parse_config(["digits", "--name", name, "--workdir", "x"], "train.py", "")
    assert config.workdir == Path("x")


# Exit statuses


@pytest.mark.parametrize(
    "error, status",
    [
        (InputError("a: 1"), 2),
        (Diverged("loss: nan"), 1),
        (Unsaved("checkpoints/7"), 1),
        (OSError(28, "No space left on device", "samples/1.png"), 1),
        (Stopped("stopped"), 0),
        (KeyboardInterrupt("interrupted"), 130),
    ],
)
def test_what_ends_a_command_is_said_in_one_line(capsys, error, status):
    with pytest.raises(SystemExit) as stop, cli.exit_status("x.py"):
        raise error
    assert stop.value.code == status
    assert capsys.readouterr().err == f"x.py: {error}\n"


def test_a_fault_of_the_program_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError), cli.exit_status("x.py"):
        1 / 0  # noqa: B018
    with cli.exit_status("x.py"):
        pass
    assert capsys.readouterr().err == ""


def test_a_command_in_this_process_answers_as_its_own_process_does(refused, without_jax):
    argv = ["nowhere", "--eta", "3"]
    line = refused(run_sample, *argv)
    assert without_jax("sample.py", *argv).stderr == line + "\n"


def test_programs_are_cached_unless_jaxs_variables_say_where(monkeypatch):
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    for name in names:
        monkeypatch.setenv(name, "mine")
    cli.use_compilation_cache()
    assert [os.environ[name] for name in names] == ["mine", "mine"]
    for name in names:
        monkeypatch.delenv(name)
    cli.use_compilation_cache()
    assert os.environ[names[0]].endswith("minimal-dit/xla")
    assert float(os.environ[names[1]]) < 1


# Signals


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_kills(number):
    program = f"""
import signal
from dit.signals import StopRequest
with StopRequest() as stop:
    print(stop.requested)
    signal.raise_signal({number})
    print(stop.requested, flush=True)
    signal.raise_signal({number})
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -number
    assert (done.stdout, done.stderr) == ("False\nTrue\n", "")


BUSY = """
import hashlib
from dit.signals import StopRequest
stop = StopRequest().end_at_once("x.py")
{}
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**{})  # Python runs no handler meanwhile, as XLA compiles
print(stop.requested)
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "before, power, out", [("", 9, ""), ("stop.__enter__()", 6, "True\n")], ids=["start", "run"]
)
def test_before_a_run_a_signal_ends_it_at_once_and_in_it_is_noted(number, before, power, out):
    command = [sys.executable, "-c", BUSY.format(before, power)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    answer = process.communicate(timeout=60)
    assert answer == (out, "" if before else "x.py: interrupted\n")
    assert process.returncode == (0 if before else 128 + number)


def test_a_signal_that_is_ignored_stays_so():
    """As nohup has it with SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_a_run_that_was_not_stopped_signals_act_as_ever():
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyError), StopRequest() as stop:
        assert [signal.getsignal(n) for n in SIGNALS] != handlers
        raise KeyError
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert not stop.requested
