"""Imports point down: a module imports only modules of the rows below its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROWS = [
    "plan",
    "train sample",
    "dit.dry_run",
    "dit.run",
    "dit.log",
    "dit.writers",
    "dit.imagenet.convert dit.imagenet.fid dit.imagenet.latents",
    "dit.imagenet.diffusers",
    "dit.imagenet.official",
    "dit.imagenet.vae dit.imagenet.inception",
    "dit.imagenet.tensors",
    "dit.identity dit.generation dit.heldout",
    "dit.resume",
    "dit.checkpoint",
    "dit.state",
    "dit.data",
    "dit.folder",
    "dit.tfds",
    "dit.prepare",
    "dit.sampling",
    "dit.flow",
    "dit.model",
    "dit.normalization",
    "dit.linear",
    "dit.hosts",
    "dit.sharding",
    "dit.progress",
    "dit.ddpm",
    "dit.images dit.metrics",
    "dit.intact",
    "dit.files",
    "dit.topology",
    "dit.chips dit.program",
    "dit.cli dit.heap dit.signals",
    "dit.config",
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row.split()}
SCRIPTS = {"plan", "train", "sample"}
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def file_of(name: str) -> Path:
    return ROOT / (name.replace(".", "/") + ".py")


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node of a file, those inside functions too, without those under TYPE_CHECKING."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not is_for_types:
            yield from nodes(node)


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports."""
    modules = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: no relative imports"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= (named & RANK.keys()) or {node.module}
    ours = {module for module in modules if module.split(".")[0] in SCRIPTS | {"dit"}}
    assert ours <= RANK.keys(), f"{path.name}: imports from modules, not from packages"
    return ours


def test_every_module_has_a_row():
    packages = [ROOT / "dit", ROOT / "dit/imagenet"]
    files = [path for folder in [ROOT, *packages] for path in folder.glob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert {name for name in names if not name.endswith("__init__")} == RANK.keys()


def test_packages_import_nothing_of_ours():
    tree = ast.parse((ROOT / "dit/imagenet/__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Expr], "a docstring alone"
    tree = ast.parse((ROOT / "dit/__init__.py").read_text())
    at_once = [ast.unparse(node) for node in tree.body if "import" in type(node).__name__.lower()]
    assert not [line for line in at_once if "dit" in line], "only what is asked for"


@pytest.mark.parametrize("name", RANK)
def test_imports_point_down(name):
    for other in imports(file_of(name)):
        assert RANK[other] > RANK[name], f"{name} imports {other}"


@pytest.mark.parametrize("name", RANK)
def test_only_the_plan_imports_a_script(name):
    allowed = {"train"} if name == "plan" else set()
    assert imports(file_of(name)) & SCRIPTS == allowed


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_import_the_config_alone(preset):
    assert imports(ROOT / "configs" / f"{preset}.py") == {"dit.config"}
