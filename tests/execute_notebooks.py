"""Run notebooks as a reader would, and keep of their outputs what belongs to the page.

python tests/execute_notebooks.py notebooks/data_preview.ipynb    # writes it anew, with its outputs
"""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


ROOT = Path(__file__).parents[1]
CELL_SECONDS = 3600  # of a kernel that hangs, on a busy machine


def execute(file: Path, folder: Path, **environment: str) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel, and return it with its outputs.

    Args:
        file (`Path`): the notebook.
        folder (`Path`): an empty folder, which links make a copy of the repository; files are written there.
        environment (`str`): variables that the kernel sees beside those of this process.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    for name in ("train_scripts", "model_cards", "visbio_diffusers"):
        (folder / name).symlink_to(ROOT / name)
    inner = folder / "notebooks"  # as in the repository, where Jupyter starts kernels beside their notebooks
    inner.mkdir()
    notebook = nbformat.read(file, as_version=4)
    place = {"metadata": {"path": str(inner)}}
    client = NotebookClient(notebook, timeout=CELL_SECONDS, coalesce_streams=True, resources=place)
    python = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    client.execute(env={**os.environ, "PYTHONPATH": python, **environment})
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Keep one form of each picture, of 256 colours, and no times of execution."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
                small = io.BytesIO()
                picture.quantize(256).save(small, "PNG", optimize=True)
                output.data = {"image/png": base64.b64encode(small.getvalue()).decode()}
    return notebook


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            nbformat.write(tidy(execute(Path(argument), Path(scratch))), argument)
