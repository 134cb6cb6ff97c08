"""The README's commands and Python run as they stand there; training commands for two steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("bash", "python", "json")}
COMMANDS = [
    line.strip()
    for block in BLOCKS["bash"]
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
    if line.startswith(("visbio ", "accelerate "))
]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


SMALL = {
    "evaluate": "--num_images 16 --num_wording_images 8 --num_inference_steps 2 --evaluator_steps 2".split(),
    "audit": "--num_images 16 --num_members 16".split(),
}


def run(command, folder):
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, visbio_data):
    """A folder in which the README's relative paths hold, with images of one's own as it describes them."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("train_scripts", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_images").mkdir()
    for number in (1, 2):
        Image.new("RGB", (64, 64), (90 * number, 0, 90)).save(folder / "my_images" / f"{number:04d}.png")
    line = BLOCKS["json"][0]
    (folder / "my_images" / "metadata.jsonl").write_text(line + line.replace("0001", "0002"))
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as real:
        few = {name: real[name][:200] for name in real.files if name.endswith(("images", "labels"))}
    np.savez(folder / "bloodmnist_few.npz", **few)
    return folder


def test_commands_run_as_written(workplace):
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "accelerate":
            words[1:2] = ["launch", "--cpu", "--num_processes", "1"]
            words += ["--max_train_steps", "2", "--train_batch_size", "2", "--report_to", "none"]
            words += ["--validation_steps", "0", "--lr_warmup_steps", "1"]
        elif words[1] in SMALL:
            words = [re.sub("^bloodmnist$", "bloodmnist_few.npz", word) for word in words] + SMALL[words[1]]
        else:
            words = [re.sub(r"^100$", "1", word) for word in words]  # --per-class 100
        run(words, workplace)
    assert Image.open(workplace / "out.png").width > 28
    assert Image.open(workplace / "mine.png").info["synthetic"]
    assert Image.open(workplace / "adapted.png").info["lora"] == "lora"
    report = workplace / "runs" / "report"
    assert {"results.json", "results.md", "results.html", "audit"} <= {file.name for file in report.iterdir()}
    assert Image.open(report / "audit" / "closest_pairs.png").width > 900


def test_python_blocks_run_as_written(workplace):
    for block in BLOCKS["python"]:
        run([sys.executable, "-c", block], workplace)
    assert Image.open(workplace / "monocyte.png").size == (28, 28)
