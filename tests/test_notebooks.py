"""The notebooks as files, and, where time allows, as a reader runs them, from start to end."""

from __future__ import annotations

import ast
import base64
import io
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
pytest.importorskip("nbclient", reason="needs the extra notebooks")
pytest.importorskip("ipykernel", reason="needs the extra notebooks")

from execute_notebooks import execute  # noqa: E402


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 600_000
CPU_SECONDS = 300
MACHINE = re.compile(r"(?<![\w.])/(root|home|Users|tmp|work|private|var|content|opt|usr|mnt)/|[A-Z]:\\")

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook) -> list[Image.Image]:
    found = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def texts(output) -> str:
    """Return all that an output says in words."""
    return output.get("text", "") + "".join(output.get("data", {}).get("text/plain", ""))


def test_both_are_there_and_begin_alike():
    assert [file.name for file in NOTEBOOKS] == ["data_preview.ipynb", "train_diffusion_biomed.ipynb"]
    setups = [code_cells(nbformat.read(file, as_version=4))[0].source for file in NOTEBOOKS]
    assert setups[0] == setups[1] and "REPOSITORY" in setups[0]


@each_notebook
def test_file_is_valid_and_small(file):
    nbformat.validate(nbformat.read(file, as_version=4))
    assert file.stat().st_size <= MAX_BYTES


@each_notebook
def test_code_parses_and_is_formatted(file):
    from IPython.core.inputtransformer2 import TransformerManager

    for cell in code_cells(nbformat.read(file, as_version=4)):
        if cell.source.startswith("%%bash\n"):
            subprocess.run(["bash", "-n"], input=cell.source.partition("\n")[2], text=True, check=True)
        else:
            ast.parse(TransformerManager().transform_cell(cell.source))
    pytest.importorskip("ruff", reason="needs the extra dev")
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, str(file)], cwd=ROOT, check=True)


def check_outputs(notebook):
    """Assert that each cell ran, in order and without error, and that no output names a place on the machine."""
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert not MACHINE.search(texts(output)), texts(output)
        assert "\r" not in texts(output)
    assert len(pictures(notebook)) >= 5


@each_notebook
def test_outputs_are_of_one_run_and_name_no_machine(file):
    notebook = nbformat.read(file, as_version=4)
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    check_outputs(notebook)


@pytest.mark.slow
@each_notebook
def test_runs_within_five_minutes(file, tmp_path, visbio_data):
    """Minutes of one core, as others may be at work on the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = execute(file, tmp_path, VISBIO_DATA=str(visbio_data))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    check_outputs(notebook)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= CPU_SECONDS


@pytest.mark.slow
def test_photographs_are_made_where_there_are_none(tmp_path, visbio_data):
    data = tmp_path / "data"
    data.mkdir()
    (data / "medmnist").symlink_to(visbio_data / "medmnist")
    execute(ROOT / "notebooks" / "data_preview.ipynb", tmp_path, VISBIO_DATA=str(data))
    assert [file.name for file in tmp_path.rglob("*_masks.png")] == ["tissue_masks.png"]
