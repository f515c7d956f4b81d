"""`import dit` from any folder, and the README's snippets, run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMISED, awaken, tiny_config

import dit
import train
from dit import checkpoint, cli, identity
from dit.config import replace
from dit.model import BLOCKS, DiT
from dit.sharding import make_mesh
from dit.state import make_model, make_state

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
INSTALLED = ["pyproject.toml", "README.md", "LICENSE", "train.py", "sample.py", "plan.py"]


def snippets(heading: str, language: str = "python") -> list[str]:
    """The README's snippets of a language under a heading."""
    section = re.search(rf"^## {heading}\n(.*?)^## ", README, re.M | re.S)[1]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)


def run_python(code: str, folder: Path, path: Path = ROOT) -> str:
    """What a program prints that runs in a folder and finds its modules in a path."""
    variables = os.environ | OPTIMISED | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


# Names


def test_every_name_is_there_and_no_other():
    for name in dit.__all__:
        assert callable(getattr(dit, name))
        assert name in dir(dit)
    assert (dit.DiT, dit.load) == (DiT, checkpoint.load)
    assert dit.preset("digits") == cli.load_preset("digits")
    with pytest.raises(AttributeError, match="module 'dit' has no attribute 'sample'"):
        dit.sample  # noqa: B018


def test_a_script_of_the_callers_may_be_called_train_too(tmp_path):
    own = "import dit\nprint(dit.train.__doc__.splitlines()[0])\n"
    (tmp_path / "train.py").write_text(own)
    assert run_python("import train", tmp_path) == train.train.__doc__.splitlines()[0] + "\n"


def test_it_works_in_any_folder_when_installed(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    for name in ("dit", "configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in INSTALLED:
        shutil.copy(ROOT / name, source)
    elsewhere.mkdir()
    install = "pip install -q --no-deps --no-build-isolation --no-index --target".split()
    subprocess.run([sys.executable, "-m", *install, target, source], check=True)
    shutil.rmtree(source)
    code = """
        import dit
        from dit import cli, writers
        print(dit.__file__)
        print(*cli.preset_names())
        print(writers.known_band(dit.preset("digits_flow")).shape)
        print(dit.train.__code__.co_filename)
        """
    lines = run_python("\n".join(map(str.strip, code.splitlines())), elsewhere, target).split("\n")
    presets = " ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
    expected = [str(target / "dit/__init__.py"), presets, "(60, 3)", str(target / "train.py"), ""]
    assert lines == expected
    command = [sys.executable, "-m", "train", "digits", "--help"]
    variables = os.environ | {"PYTHONPATH": str(target)}
    subprocess.run(command, cwd=elsewhere, env=variables, check=True, capture_output=True)


# The README's snippets


def test_the_library_does_what_the_readme_says(tmp_path):
    (snippet,) = snippets("As a library")
    assert len([line for line in snippet.splitlines() if line]) <= 10
    assert "compiled in" in run_python(snippet, tmp_path)
    assert (tmp_path / "runs/library/checkpoints/50").is_dir()


def test_a_block_of_ones_own_is_a_class_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dit.model.BLOCKS", dict(BLOCKS))
    snippet = snippets("Change it")[0]
    (tmp_path / "my_config.py").write_text(snippet)
    config = cli.load_preset(str(tmp_path / "my_config.py")).validate()
    assert config.name == config.model.conditioning == "parallel"
    sizes = dict(hidden_size=20, depth=2, num_heads=5)
    config = replace(config, model=sizes, train=dict(batch_size=16, steps=2, sample_every=0))
    assert identity.report(config) == []
    config = replace(config, train=dict(workdir=str(tmp_path / "run")))
    dit.train(config)
    model, config = dit.load(tmp_path / "run")
    assert type(model.blocks).__name__ == "ParallelBlock"
    block = jax.tree.map(lambda leaf: leaf[0], awaken(model).blocks)
    x, c = jnp.ones((1, 3, 20)).at[:, 1].set(jnp.arange(20.0)), jnp.ones((1, 1, 20))
    series = BLOCKS["adaln_zero"].__call__(block, x, c)
    assert jnp.abs(block(x, c) - series).max() > 1e-3


def test_a_loss_of_ones_own_is_one_line_in_train_step():
    names = {}
    exec(snippets("Change it")[1], names)
    (diff,) = snippets("Change it", "diff")
    before, after = (line[1:] for line in diff.splitlines())
    source = Path(train.__file__).read_text()
    assert source.count(before) == 1
    changed = types.ModuleType("changed")
    changed.absolute_loss = names["absolute_loss"]
    exec(source.replace(before, after), changed.__dict__)

    config = tiny_config(objective=dict(name="flow", num_steps=1000, schedule="linear"))
    state = make_state(config, make_mesh(config))
    image = jnp.zeros((16, 8, 8, 1), jnp.uint8)
    batch = {"image": image, "label": jnp.zeros(16, int)}
    _, metrics = jax.jit(changed.train_step, static_argnums=0)(config, state, batch)
    assert metrics["loss"] == metrics["absolute_error"]
    # the first model predicts v = 0: the mean |noise + 1| is known
    expected = 2 * np.exp(-0.5) / np.sqrt(2 * np.pi) + 0.682689
    assert float(metrics["loss"]) == pytest.approx(expected, abs=0.1)


def test_a_sampler_of_ones_own_is_a_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(
        tiny_config(objective=dict(name="flow", num_steps=1000, schedule="linear")),
        train=dict(sampler="heun"),
    )
    model = awaken(make_model(config, jax.random.key(0)), 0.05)
    checkpoint.save_weights(Path("runs/digits_flow"), model, config, tuple("0123456789"))
    names = {}
    exec(snippets("Change it")[2], names)
    assert names["images"].shape == (3, 8, 8, 1)
    heun = dit.generate(model, config, labels=[3, 5, 8], steps=25)
    assert np.abs(names["images"].astype(int) - heun).mean() < 1
