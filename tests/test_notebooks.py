import os
from pathlib import Path

import nbformat
import pytest
from conftest import OPTIMISED, awaken, tiny_model, write_vae
from nbclient import NotebookClient

from dit.imagenet.official import to_official
from dit.imagenet.tensors import write_tensors

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
OFFLINE = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb") if path.stem != "imagenet")
STEPS = {"conditional_normalization": "30"}  # of training, where 60 would be too slow


def execute(path: Path, **variables) -> int:
    """Runs every cell, from top to bottom, in a fresh kernel; returns how many pictures it shows.

    The notebooks assert what they claim.
    """
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder)
    client.execute(env=os.environ | variables | OPTIMISED)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", OFFLINE)
def test_notebook_runs(name):
    assert execute(NOTEBOOKS / f"{name}.ipynb", STEPS=STEPS.get(name, "60")) >= 2


@pytest.mark.parity  # a .pt file takes PyTorch
def test_the_notebook_of_the_published_weights_runs_on_random_ones_of_the_same_layout(tmp_path):
    sizes = dict(
        input_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=384,
        depth=2,
        num_heads=6,
        num_classes=1000,
    )
    model = awaken(tiny_model(**sizes), 0.05)
    write_vae(tmp_path / "vae")
    write_tensors(tmp_path / "DiT-XL-2-256x256.pt", to_official(model))
    assert execute(NOTEBOOKS / "imagenet.ipynb", DIT_WEIGHTS=str(tmp_path)) == 2
    for name in ("classes.png", "between.png"):
        assert (tmp_path / name).is_file()
