"""Commands and Python in README and cards run as they stand there; training commands for two steps."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import requests
import tifffile
from entrez_server import EntrezServer, stored_articles
from hub_server import HubServer
from PIL import Image


ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CARDS = sorted(ROOT.glob("model_cards/*/README.md"))
PROGRAMS = ("visbio ", "accelerate ", "python train_scripts/", "python tests/")
OURS = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}
ENVIRONMENT = {**os.environ, **OURS}
FEW = "--num_images 16 --num_wording_images 8"
# What is added to a command so that it ends soon; the first that it holds counts.
SMALL = {
    "benchmark.py": f"{FEW} --max_train_steps 2 --generator_preset tiny",
    "evaluate_low_data.py": "--per_class 10 --synthetic_per_class 1 --generator_steps 2 --generator_preset tiny"
    " --classifier_steps 2 --seeds 0",
    "evaluate_reconstruction.py": "--num_images 2 --num_inference_steps 1 --denoising_steps 1 --num_samples 1"
    " --evaluators model_cards/evaluators-blood-28",
    "evaluate_alignment.py": "--supervised_steps 2 --num_generator_images 2",
    "visbio evaluate": f"{FEW} --num_inference_steps 2 --evaluator_steps 2 --cas_steps 2",
    "visbio explain": "--num-seeds 2 --steps 2",
    "visbio demo --votes": "--port 7894 --device cpu",
    "visbio audit": "--num_images 16 --num_members 16",
    "train_alignment.py": "--max_train_steps 2 --train_batch_size 2 --report_to none --lr_warmup_steps 1",
    "evaluate_attribution.py": "--num_images 2 --num_choice_images 2 --num_noises 1",
    "draw_pairs.py": "--num_pairs 2 --num_processes 1",
    "evaluate_reward.py": "--num_prompts 2 --num_images_per_prompt 1 --num_processes 1",
    "--preset micro-64": "--max_train_steps 2 --train_batch_size 2 --report_to none --validation_steps 0"
    ' --lr_warmup_steps 1 --compile false --captions_per_class 8 --unet_config {"block_out_channels":[16,32]}',
    "evaluate_samplers.py": "--num_images 16 --samplers unipc --steps 1 --evaluator_steps 2",
    "evaluate_subtypes.py": "--num_images_per_subtype 1 --num_wording_images_per_subtype 1 --num_inference_steps 1"
    " --evaluator_steps 2",
    "evaluate_counts.py": "--num_images 4 --num_inference_steps 1 --counter_steps 2",
    "evaluate_reward_tuning.py": "--judge_steps 2 --num_images_per_prompt 1 --num_class_images 1",
    "train_ddpo_lora.py": "--num_rounds 1 --num_prompts_per_round 2 --num_images_per_prompt 2 --sample_steps 4"
    " --train_batch_size 2 --num_validation_prompts 1 --draft_steps 1 --report_to none",
    "train_dpo_lora.py": "--max_train_steps 2 --train_batch_size 2 --report_to none",
    "train_reward.py": "--max_train_steps 2 --train_batch_size 2 --report_to none",
    "train_scripts/train_": "--max_train_steps 2 --train_batch_size 2 --report_to none --validation_steps 0"
    " --lr_warmup_steps 1",
}


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", file.read_text(), re.DOTALL)


def commands(file: Path) -> tuple[list[str], list[str]]:
    """Return the commands in the blocks of a Markdown file, and those within its lines that have a flag."""
    text = file.read_text()
    of_blocks = [line for block in blocks(file, "bash") for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    inline = re.findall(r"`([^`\n]+ --[^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return tuple([line for line in lines if line.startswith(PROGRAMS)] for lines in (of_blocks, inline))


def shortened(command: str) -> list[str]:
    """Return the words of a command with flags that let it end soon."""
    words = shlex.split(command)
    for name, flags in SMALL.items():
        if name in command:
            if "--images" in words:  # which are not drawn
                flags = flags.replace("--num_inference_steps 2", "")
            words += flags.split()
            break
    if words[0] == "accelerate":
        words[1:2] = ["launch", "--cpu", "--num_processes", "1"]
    return [re.sub(r"^100$", "1", word) for word in words]  # --per-class 100


def on(data: str, words: list[str]) -> list[str]:
    """Return the words of a command with `data` as its set in the place of BloodMNIST, which would be downloaded."""
    before = ["", *words]
    return [data if pair == ("--dataset_name", "bloodmnist") else pair[1] for pair in zip(before, words)]


def run(command, folder, environment=ENVIRONMENT):
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def visit(command, folder):
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().split()[0]
        assert requests.get(address).status_code == 200
        server.terminate()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, visbio_data):
    """A folder in which the README's relative paths hold, with images of one's own as it describes them."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("train_scripts", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").symlink_to(visbio_data)
    (folder / "my").mkdir()
    (folder / "my" / "pipeline").symlink_to(ROOT / "model_cards" / "visbio-blood-28")
    for number in (1, 2):  # of the other trainings that the card of the dual encoder tells of
        (folder / "runs" / f"align-{number}").mkdir(parents=True)
        (folder / "runs" / f"align-{number}" / "alignment").symlink_to(ROOT / "model_cards" / "visbio-align-blood")
    (folder / "my_images").mkdir()
    for number in (1, 2):
        Image.new("RGB", (64, 64), (90 * number, 0, 90)).save(folder / "my_images" / f"{number:04d}.png")
    line = blocks(README, "json")[0]
    (folder / "my_images" / "metadata.jsonl").write_text(line + line.replace("0001", "0002"))
    (folder / "my_photographs").mkdir()
    masks = np.pad(np.ones((64, 64), np.uint16), 64)
    tifffile.imwrite(folder / "my_photographs" / "0001_masks.tif", masks)
    tifffile.imwrite(folder / "my_photographs" / "0001_img.tif", np.stack([masks, masks]), photometric="minisblack")
    (folder / "pbc64").mkdir()
    for split in ("train", "test"):
        few = pq.read_table(visbio_data / "pbc64" / f"{split}.parquet").slice(0, 200)
        pq.write_table(few, folder / "pbc64" / f"{split}.parquet")
    (folder / "dsb2018_cellpose").mkdir()
    for file in (visbio_data / "dsb2018_cellpose").glob("0[0-4]?_*.png"):
        (folder / "dsb2018_cellpose" / file.name).symlink_to(file)
    with np.load(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz") as real:
        few = {name: real[name][:200] for name in real.files if name.endswith(("images", "labels"))}
    Image.fromarray(few["test_images"][0]).save(folder / "cell.png")
    pair = {"prompt": "a monocyte", "image_w": "cell.png", "image_l": "my_images/0001.png"}
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    for number in (1, 2):
        article = gzip.compress((visbio_data / "pubmed" / "Entrez" / f"pubmed{number}.xml").read_bytes())
        (folder / ("pubmed26n0001.xml.gz", "pubmed26n1335.xml.gz")[number - 1]).write_bytes(article)
    (folder / "article.nxml").symlink_to(visbio_data / "pubmed" / "pmc" / "pone.0046493.nxml")
    (folder / "my_captions.txt").write_text("a monocyte\na basophil\n")
    for name in ("bloodmnist_few", "mine"):
        np.savez(folder / f"{name}.npz", **few)
    return folder


def test_commands_run_as_written(workplace):
    written = commands(README)[0]
    assert len(written) >= 8
    articles = stored_articles(workplace / "data" / "pubmed" / "Entrez")
    with HubServer({"hf_token": ("my-name", "write")}) as hub, EntrezServer(articles) as ncbi:
        logged_in = {**hub.environment("hf_token", workplace / "home"), **OURS}
        for command in written:
            words = on("bloodmnist_few.npz", shortened(command))
            words += ["--base_url", ncbi.url] if "--email" in words else []
            if "demo" in words and "--port" in words:  # which does not end
                visit(words, workplace)
                continue
            run(words, workplace, logged_in if "push_to_hub" in command else ENVIRONMENT)
        assert hub.repos["my-name/my-model"].private and "unet/config.json" in hub.files("my-name/my-model")
    assert Image.open(workplace / "out.png").width > 28
    assert (workplace / "my-space" / "app.py").is_file()
    assert Image.open(workplace / "mine.png").info["synthetic"]
    assert Image.open(workplace / "adapted.png").info["lora"] == "lora"
    assert Image.open(workplace / "band.png").info["reward_sha256"]  # whose judge that reward may not be
    report = workplace / "runs" / "report"
    assert Image.open(workplace / "why.png").width > 400
    assert {"results.json", "results.md", "results.html", "audit"} <= {file.name for file in report.iterdir()}
    assert Image.open(report / "audit" / "closest_pairs.png").width > 900


def test_python_blocks_run_as_written(workplace):
    for block in blocks(README, "python"):
        run([sys.executable, "-c", block], workplace)
    assert Image.open(workplace / "monocyte.png").size == (28, 28)


@pytest.mark.parametrize("file", [file for file in CARDS if blocks(file, "python")], ids=lambda file: file.parent.name)
def test_python_blocks_of_cards_run_as_written(file, workplace):
    for block in blocks(file, "python"):
        run([sys.executable, "-c", block], workplace)


@pytest.mark.slow
def test_commands_of_cards_and_of_lines_run_as_written(workplace):
    """With the real data and its judges; rows of the benchmark in their order, as one needs the time of another."""
    written = [command for file in CARDS for part in commands(file) for command in part] + commands(README)[1]
    for command in dict.fromkeys(written):
        real = "data/medmnist/bloodmnist_rebuilt_28.npz"
        run(on(real, shortened(command)), workplace)
