"""The command `visbio`: images and sets from a tiny pipeline, their provenance, resumption after a kill, mistakes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from visbio_diffusers import VisBioPipeline, __version__, generate, load
from visbio_diffusers.captions import load_bank
from visbio_diffusers.cli import main
from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.data.medmnist import MEDMNIST


PROMPTS = ["a monocyte", "a platelet, Wright-Giemsa stain"]
BLOOD = load_bank("bloodmnist").class_names


@pytest.fixture
def visbio(tiny_pipeline_dir, tmp_path, monkeypatch):
    """Return a function that runs `visbio generate` with the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        return main(["generate", "--model", str(tiny_pipeline_dir), "--device", "cpu", "--steps", "3", *arguments])

    return run


def blood(output: str, form: str = "imagefolder", per_class: int = 3, *more: str) -> list[str]:
    return ["--dataset", "bloodmnist", "--per-class", str(per_class), "--format", form, "--output", output, *more]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "visbio_diffusers.cli", "generate", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def test_image_is_redrawn_from_its_metadata(visbio, tiny_pipeline_dir, tmp_path, capsys):
    arguments = ["--num-images", "3", "--seed", "5", "--guidance-scale", "2.5", "--negative-prompt", "blur"]
    assert visbio(*PROMPTS, *arguments, "--output", "some/out.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(Path("some/out.png"))
    assert [path.name for path in sorted(Path("some/out").iterdir())] == [f"{index:05d}.png" for index in range(6)]

    text = Image.open("some/out/00004.png").text
    parameters = json.loads(text["parameters"])
    assert (text["synthetic"], text["prompt"], text["negative_prompt"]) == ("true", PROMPTS[1], "blur")
    assert (text["seed"], text["num_inference_steps"], text["guidance_scale"]) == ("6", "3", "2.5")
    assert (text["version"], text["scheduler"], text["model"]) == (
        __version__,
        "DDIMScheduler",
        tiny_pipeline_dir.name,
    )
    assert "ynthetic" in text["Description"]
    assert "visbio_diffusers" in text["Software"]
    weights = (tiny_pipeline_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert text["model_sha256"] == parameters["model_sha256"] == hashlib.sha256(weights).hexdigest()

    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    generator = torch.Generator().manual_seed(parameters["seed"])
    again = np.asarray(pipe(**parameters["call"], generator=generator).images[0]).astype(int)
    assert abs(again - pixels(Path("some/out/00004.png"))).max() <= 1
    assert abs(again - pixels(Path("some/out/00003.png"))).max() > 50

    with Image.open("some/out.png") as grid:
        assert (grid.text["synthetic"], grid.width > 3 * 160) == ("true", True)
        drawn = json.loads(grid.text["parameters"])["images"]
    assert drawn == [{"prompt": prompt, "seed": seed} for prompt in PROMPTS for seed in (5, 6, 7)]


def test_image_depends_on_its_seed_alone(visbio):
    assert visbio(PROMPTS[0], "--num-images", "5", "--output", "a.png") == 0
    assert visbio(PROMPTS[0], "--num-images", "3", "--batch-size", "2", "--output", "b.png") == 0
    assert visbio(PROMPTS[0], "--num-images", "1", "--seed", "2", "--output", "c.png") == 0
    images = [pixels(Path("a") / f"{index:05d}.png").astype(int) for index in range(3)]
    for index, image in enumerate(images):
        assert abs(image - pixels(Path("b") / f"{index:05d}.png")).max() <= 1
    assert abs(images[2] - pixels(Path("c/00000.png"))).max() <= 1
    assert abs(images[0] - images[1]).max() > 50


def test_defaults_are_those_of_the_pipeline(tiny_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "default_model", lambda: tiny_pipeline_dir)
    assert main(["generate", PROMPTS[0], "--num-images", "2", "--height", "12", "--device", "cpu"]) == 0
    parameters = json.loads(Image.open("out/00001.png").text["parameters"])
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    expected = pipe([PROMPTS[0]] * 2, generator=generators, height=12).images[1]
    assert np.array_equal(np.asarray(expected), pixels(Path("out/00001.png")))
    assert (parameters["call"]["height"], parameters["call"]["width"]) == (12, 8)
    assert parameters["model"] == load.DEFAULT_MODEL


def test_a_smaller_run_removes_the_rest_of_a_larger_one_and_nothing_else(visbio):
    assert visbio(PROMPTS[0], "--num-images", "3") == 0
    Image.new("RGB", (4, 4)).save("out/00009.png")
    Path("out/notes.txt").write_text("mine")
    assert visbio(PROMPTS[1], "--num-images", "1") == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["00000.png", "00009.png", "notes.txt"]


def test_imagefolder_loads_with_labels_and_captions(visbio, tmp_path, capsys):
    assert visbio(*blood("set", "imagefolder", 3, "--seed", "7", "--prompts", "captions")) == 0
    assert capsys.readouterr().out == "set\n"
    table = datasets.load_dataset("imagefolder", data_dir="set", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == 24
    assert np.bincount(table["label"][:]).tolist() == [3] * 8
    rows = sorted(table.remove_columns("image"), key=lambda row: row["seed"])
    assert [row["seed"] for row in rows] == list(range(7, 31))
    assert [row["class_name"] for row in rows] == list(BLOOD) * 3
    assert all(row["synthetic"] and row["text"] == row["prompt"] for row in rows)
    assert len({row["text"] for row in rows}) == 24
    assert table[0]["image"].size == (8, 8)
    recorded = json.loads(Path("set/generation.json").read_text())
    assert (recorded["seed"], recorded["class_names"], recorded["call"]["num_inference_steps"]) == (7, [*BLOOD], 3)

    ours = load_image_dataset("set", caption_bank=None, cache_dir=tmp_path / "cache")
    assert (len(ours), ours.captions) == (24, table["text"][:])
    text = Image.open("set/train/platelet/00002.png").text
    assert json.loads(text["parameters"])["class_name"] == "platelet"
    assert text["prompt"] in table["text"][:]


def test_npz_is_in_medmnists_format(visbio, tmp_path):
    assert visbio(*blood("bloodmnist_drawn.npz", "npz")) == 0
    assert visbio(*blood("set")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bloodmnist_drawn.json", "bloodmnist_drawn.npz", "set"]
    drawn = load_image_dataset("bloodmnist_drawn.npz")
    assert (drawn.images.shape, drawn.images.dtype, drawn.class_names) == ((24, 8, 8, 3), np.uint8, BLOOD)
    assert drawn.labels.tolist() == [*range(8)] * 3
    assert np.load("bloodmnist_drawn.npz", allow_pickle=False)["train_labels"].shape == (24, 1)
    rows = json.loads(Path("bloodmnist_drawn.json").read_text())["images"]
    for image, row in zip(drawn.images, rows, strict=True):
        assert np.array_equal(image, pixels(Path("set/train") / row["file_name"]))
    before = Path("bloodmnist_drawn.npz").stat().st_mtime_ns
    assert visbio(*blood("bloodmnist_drawn.npz", "npz")) == 0
    assert Path("bloodmnist_drawn.npz").stat().st_mtime_ns == before


def test_multi_label_set_has_each_finding_alone_and_none():
    bank = load_bank("chestmnist")
    items = generate.plan(generate.LabelledSet(bank, 2))
    assert len(items) == 30
    assert np.array_equal([item.label for item in items[:15]], np.eye(15, 14, dtype=int))
    assert items[14].prompt == bank.plain_caption([0] * 14)
    assert len({item.path for item in items}) == 30


def test_class_names_make_good_folders():
    items = generate.plan(generate.LabelledSet(load_bank("tissuemnist"), 1))
    assert items[0].class_name == "collecting duct, connecting tubule"
    assert items[0].path == "train/collecting_duct_connecting_tubule/00000.png"


def test_grid_has_a_row_for_each_class(visbio, capsys):
    assert visbio(*blood("demo/cells.png", "grid", 2)) == 0
    assert capsys.readouterr().out == f"{Path('demo/cells.png')}\n"
    with Image.open("demo/cells.png") as grid:
        drawn = json.loads(grid.text["parameters"])["images"]
        assert grid.height > 3 * grid.width
    bank = load_bank("bloodmnist")
    assert [image["prompt"] for image in drawn] == [bank.plain_caption(label) for label in range(8) for _ in range(2)]
    assert [image["seed"] for image in drawn[:4]] == [0, 8, 1, 9]  # as in a folder, where classes take turns
    assert [path.name for path in Path("demo").iterdir()] == ["cells.png"]


KILLED = """
import os, signal, sys
from visbio_diffusers import generate
from visbio_diffusers.cli import main

save, number = generate.save_png, iter(range(7))

def save_and_die(*arguments):
    save(*arguments)
    if next(number) == 6:
        os.kill(os.getpid(), signal.SIGKILL)

generate.save_png = save_and_die
main(sys.argv[1:])
"""


def test_killed_runs_end_as_uninterrupted_ones(visbio, tiny_pipeline_dir, tmp_path, monkeypatch):
    arguments = ["--batch-size", "5", "--prompts", "captions"]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert visbio(*blood("set", "imagefolder", 3, *arguments)) == 0
    assert visbio(*blood("set.npz", "npz", 3, *arguments)) == 0

    images = tmp_path / "killed" / "set" / "train"
    model = ["--model", str(tiny_pipeline_dir), "--device", "cpu", "--steps", "3"]
    killed = [sys.executable, "-c", KILLED, "generate", *model, *blood("set", "imagefolder", 3, *arguments)]
    done = subprocess.run(killed, cwd=tmp_path / "killed", env=environment(), stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    kept = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in images.glob("*/*.png")}
    assert len(kept) == 7
    assert not (images / "metadata.jsonl").exists()
    damaged = images / BLOOD[0] / "00000.png"
    damaged.write_bytes(kept[damaged][1][:-30])
    (images / BLOOD[0] / ".tmp-1-00003.png").write_bytes(b"half")
    shutil.copytree(tmp_path / "killed" / "set", tmp_path / "killed" / "set.npz.part")  # where an npz is begun

    monkeypatch.chdir(tmp_path / "killed")
    assert visbio(*blood("set", "imagefolder", 3, *arguments)) == 0
    assert {path for path in kept if path.stat().st_mtime_ns != kept[path][0]} == {damaged}
    assert visbio(*blood("set.npz", "npz", 3, *arguments)) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_other_parameters_in_the_same_folder_are_refused(visbio, tmp_path, capsys):
    assert visbio(*blood("set", per_class=1)) == 0
    assert visbio(*blood("set.npz", "npz", 1)) == 0
    before = files(tmp_path)
    capsys.readouterr()
    for output, form in (("set", "imagefolder"), ("set.npz", "npz")):
        assert visbio(*blood(output, form, 1, "--seed", "1")) == 1
        assert "says seed=0, not 1" in capsys.readouterr().err
        assert visbio(*blood(output, form, 1, "--guidance-scale", "7")) == 1
        assert "guidance_scale=" in capsys.readouterr().err
    Path("set.json").unlink()
    assert visbio(*blood("set.npz", "npz", 1)) == 1
    assert "set.npz exists without set.json" in capsys.readouterr().err
    before.pop("set.json")
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    assert visbio(*blood("other")) == 1
    assert "other is not empty" in capsys.readouterr().err
    assert files(tmp_path) == {**before, str(Path("other/notes.txt")): b"mine"}


USAGE = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["draw"], "invalid choice: 'draw'"),
    "nothing to draw": (["generate"], "either prompts or --dataset"),
    "both": (["generate", "a cell", *blood("x")], "either prompts or --dataset"),
    "no output": (["generate", "--dataset", "bloodmnist", "--per-class", "3"], "needs --per-class and --output"),
    "no number": (["generate", "--dataset", "bloodmnist", "--output", "x"], "needs --per-class and --output"),
    "wrong counter": (["generate", *blood("x"), "--num-images", "3"], "--num-images is for prompts"),
    "other wrong counter": (["generate", "a cell", "--per-class", "3"], "--per-class is for --dataset"),
    "no png": (["generate", "a cell", "--output", "out.jpg"], "out.jpg must end in .png"),
    "no npz": (["generate", *blood("out", "npz")], "out must end in .npz"),
    "no images": (["generate", "a cell", "--num-images", "0"], "--num-images: 0 must be at least 1"),
    "seed": (["generate", "a cell", "--seed", "-1"], "--seed: -1 must be from 0"),
    "device": (["generate", "a cell", "--device", "gpu"], "--device: 'gpu' is none of"),
    "dtype": (["generate", "a cell", "--dtype", "int8"], "--dtype: invalid choice"),
    "data": (["data"], "required: ACTION"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_answered_in_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = USAGE[case]
    with pytest.raises(SystemExit) as error:
        main(arguments)
    shown = capsys.readouterr().err
    assert error.value.code == 2
    assert shown.startswith("visbio: error: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


MISTAKES = {
    "empty prompt": (["a cell", " "], "`prompt` is empty"),
    "size": (["a cell", "--height", "9"], "must be multiples of 2, but are 9 and 8"),
    "unknown set": (["--dataset", "bloodmist", "--per-class", "1", "--output", "x"], "did you mean 'bloodmnist'"),
    "large grid": (blood("x.png", "grid", 33), "33 images per class are too many for a grid"),
    "no such model": (["a cell", "--model", "./nowhere"], "no model folder ./nowhere"),
    "no such hub model": (["a cell", "--model", "nobody/nothing"], "no folder nobody/nothing here"),
    "no such device": (["a cell", "--device", "cuda:97"], "no device 'cuda:97' on this machine: it has cpu"),
    "file in the way": (["a cell", "--output", "file/out.png"], "is no folder that you may write to"),
    "no folder": (["a cell", "--output", "file.png"], "is no folder that you may write to"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_answered_in_one_line_and_leave_nothing(case, visbio, tmp_path, capsys):
    arguments, message = MISTAKES[case]
    Path("file").write_text("mine")
    assert visbio(*arguments) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("visbio: error: ")
    assert message in shown
    assert files(tmp_path) == {"file": b"mine"}


def test_a_model_refuses_a_set_whose_classes_it_has_not_learned(visbio, tiny_pipeline_dir, tmp_path, capsys):
    shutil.copytree(tiny_pipeline_dir, "model")
    Path("model", "training.json").write_text('{"caption_banks": ["bloodmnist"]}')
    assert visbio("--model", "model", "--dataset", "pathmnist", "--per-class", "1", "--output", "set") == 1
    assert "has learned the classes of bloodmnist, not those of pathmnist" in capsys.readouterr().err
    assert not Path("set").exists()
    assert visbio("--model", "model", *blood("set", "imagefolder", 1)) == 0


def test_full_disk_is_named_and_leaves_no_half_file(visbio, monkeypatch, tmp_path, capsys):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert visbio("a cell", "--num-images", "1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("visbio: error: cannot write out/00000.png: No space left on device; ")
    assert visbio(*blood("set.npz", "npz", 1)) == 1
    assert not files(tmp_path)


def test_interrupt_ends_quietly(tiny_pipeline_dir, tmp_path):
    arguments = ["--model", str(tiny_pipeline_dir), "--device", "cpu", "--steps", "30", "--batch-size", "5"]
    process = subprocess.Popen(
        command(*arguments, *blood("set", "imagefolder", 1000)),
        cwd=tmp_path,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("set/train/*/*.png")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate()
    assert process.returncode == 130
    assert shown.endswith("\nvisbio: interrupted\n")
    assert "Traceback" not in shown


def test_command_draws_within_its_memory_and_without_datasets(tiny_pipeline_dir, tmp_path):
    code = (
        "import resource, sys; from visbio_diffusers.cli import main; code = main(sys.argv[1:]);"
        " print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 'datasets' in sys.modules); sys.exit(code)"
    )
    arguments = ["generate", "a cell", "--model", str(tiny_pipeline_dir), "--device", "cpu", "--output", "out.png"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    peak, has_datasets = done.stdout.splitlines()[-1].split()
    kilobytes = int(peak) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 1.5e6
    assert has_datasets == "False"
    assert len(list((tmp_path / "out").iterdir())) == 8


def test_data_list(capsys):
    assert main(["data", "list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:]] == list(MEDMNIST)
    blood_line = next(line for line in lines if line[0] == "bloodmnist")
    assert blood_line[1:6] == ["11959", "1712", "3421", "8", "3"]


def test_data_preview(visbio_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz")
    assert main(["data", "preview", path, "--split", "test", "--num-images", "10"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "bloodmnist_rebuilt_28, test: 3421 images of 28 x 28 pixels, CC BY 4.0"
    labels = np.load(path, allow_pickle=False)["test_labels"]
    assert any(line.split() == ["class", "platelet", str((labels == 7).sum())] for line in shown)
    assert shown[-1] == "preview.png"
    with Image.open("preview.png") as sheet:
        assert sheet.width > sheet.height
    assert main(["data", "preview", path, "--split", "night"]) == 1
    assert "its splits are" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert (error.value.code, capsys.readouterr().out) == (0, f"visbio {__version__}\n")
