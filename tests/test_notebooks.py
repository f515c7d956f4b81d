import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import awaken, tiny_model, write_vae
from nbclient import NotebookClient

from dit import convert
from dit.weights import write_tensors

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def execute(path: Path, **variables):
    """Every cell, from top to bottom, in a fresh kernel; the notebooks assert what they claim. Returns the pictures they show."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=os.environ | variables | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"})  # they train
    return [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb") if path.stem != "imagenet"))
def test_notebook_runs(name):
    assert len(execute(NOTEBOOKS / f"{name}.ipynb", STEPS="60" if name == "conditional_normalization" else "100")) >= 2


@pytest.mark.parity  # a .pt file takes PyTorch
def test_the_notebook_of_the_published_weights_runs_on_random_ones_of_the_same_layout(tmp_path):
    model = awaken(tiny_model(hidden_size=384, num_heads=6, depth=2, in_channels=4, input_size=4, patch_size=2, num_classes=1000), 0.05)
    write_vae(tmp_path / "vae")
    write_tensors(tmp_path / "DiT-XL-2-256x256.pt", convert.to_official(model))
    assert len(execute(NOTEBOOKS / "imagenet.ipynb", DIT_WEIGHTS=str(tmp_path))) == 2
    assert np.all([(tmp_path / name).is_file() for name in ("classes.png", "between.png")])
