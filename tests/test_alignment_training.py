"""The training of a dual encoder: one loss over all processes, resuming, what is written, what is refused."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import VisionTextDualEncoderModel

from visbio_diffusers.alignment import load_dual_encoder
from visbio_diffusers.hub import made_repo


ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "train_scripts" / "train_alignment.py"))
EVALUATE = runpy.run_path(str(ROOT / "train_scripts" / "evaluate_alignment.py"))
SHARE = """
import sys
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from visbio_diffusers.alignment.training import shared_loss

class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(12, 5), torch.nn.Embedding(20, 5)
        self.scale, self.bias = torch.nn.Parameter(torch.tensor(7.0)), torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, images, texts):
        rows = self.image(images), self.text(texts).mean(dim=1)
        return [F.normalize(each, dim=1) for each in rows] + [self.scale, self.bias + 0 * self.scale]

accelerator = Accelerator()
model = accelerator.prepare(Towers())
torch.manual_seed(1)
meanings = torch.tensor([[0, -1], [1, -1]] * 4)
batch = torch.randn(8, 12), torch.randint(0, 20, (8, 3)), meanings, meanings
own = [each.chunk(accelerator.num_processes)[accelerator.process_index] for each in batch]
found = {}
for kind in ("clip", "siglip"):
    model.zero_grad()
    *embeds, scale, bias = model(*own[:2])
    loss, _ = shared_loss(accelerator, *embeds, own[2:], scale, bias if kind == "siglip" else None)
    (loss + 0 * bias).backward()
    gradients = {name: each.grad.clone() for name, each in accelerator.unwrap_model(model).named_parameters()}
    found[kind] = {"loss": loss.detach(), **gradients}
if accelerator.is_main_process:
    torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bloodmnist_small.npz"
    rng = np.random.default_rng(0)
    parts = {}
    for split, count in (("train", 48), ("val", 24), ("test", 24)):
        labels = np.arange(count) % 8
        images = rng.integers(0, 40, (count, 8, 8, 3)) + 25 * labels[:, None, None, None]
        parts |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(path, **parts)
    return path


@pytest.fixture(scope="module")
def train(tiny_pipeline_dir, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def run(name, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        argv = ["--preset", "tiny", "--resolution", "8", "--text_encoder", str(tiny_pipeline_dir)]
        argv += ["--save_dtype", "fp32", "--dataset_name", str(dataset), "--output_dir", str(folder / name)]
        argv += ["--max_train_steps", "4", "--learning_rate", "0.003", *map(str, flags)]
        assert SCRIPT["main"](SCRIPT["parse"](SCRIPT["AlignmentConfig"], SCRIPT["PRESETS"], argv)) == 0
        return folder / name

    return run


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    (tmp_path / "share.py").write_text(SHARE)
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    found = []
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        command = [sys.executable, *launch, str(tmp_path / "share.py"), str(tmp_path / "out.pt")]
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(tmp_path / "out.pt", weights_only=True))
    for kind in ("clip", "siglip"):
        alone, together = (each[kind] for each in found)
        assert alone["scale"].abs() > 1e-5
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6)


def test_resumed_equals_uninterrupted(train, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The patients were old. Their blood was taken.\n" * 3)
    flags = ("--checkpointing_steps", 2, "--corpus", corpus, "--freeze_text_encoder", True)
    straight = train("straight", *flags)
    train("stopped", *flags, "--max_train_steps", 2)
    resumed = train("stopped", *flags, "--resume_from_checkpoint", "latest")
    one, other = (load_file(folder / "alignment" / "model.safetensors") for folder in (straight, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (straight / "loss.jsonl").read_bytes() == (resumed / "loss.jsonl").read_bytes()


def test_frozen_text_encoder_keeps_its_layers_and_another_does_not(train, tiny_pipeline_dir):
    before = load_file(tiny_pipeline_dir / "text_encoder" / "model.safetensors")
    for frozen in (True, False):
        folder = train(f"frozen-{frozen}", "--freeze_text_encoder", frozen)
        after = load_file(folder / "alignment" / "model.safetensors")
        same = {name: torch.equal(after[f"text_model.{name}"], value) for name, value in before.items()}
        assert all(equal for name, equal in same.items() if "pooler" not in name) is frozen
        assert not same["pooler.dense.weight"]


@pytest.fixture(scope="module")
def trained(train):
    return train("trained", "--max_train_steps", 30, "--captions_per_class", 2, "--train_batch_size", 24) / "alignment"


def test_it_learns_and_is_measured(trained, dataset, tmp_path):
    record = json.loads((trained / "calibration.json").read_text())
    assert record["dataset"] == "bloodmnist_small" and record["n"] == 24 and record["scale"] > 0
    argv = ["--models", str(trained), str(trained), "--dataset_name", str(dataset), "--supervised_steps", "4"]
    argv += ["--output", str(tmp_path / "out.json"), "--foreign_dataset_name", str(dataset)]
    assert EVALUATE["main"](EVALUATE["parse"](EVALUATE["EvaluateAlignmentConfig"], {}, argv)) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    first = results["models"][0]
    losses = [json.loads(line)["loss"] for line in (trained.parent / "loss.jsonl").open()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert first["retrieval"]["image_to_text_chance"] == 0.125 and first["supervised"]["n"] == 24
    entry = results["summary"]["zero_shot/plain"]
    assert entry["mean"] == first["zero_shot"]["plain"]["value"] and entry["spread"] == 0 and entry["n"] == 2


def test_half_precision_on_disk_is_single_in_memory(train):
    folder = train("half", "--save_dtype", "fp16") / "alignment"
    assert load_file(folder / "model.safetensors")["visual_projection.weight"].dtype == torch.float16
    model = VisionTextDualEncoderModel.from_pretrained(folder)
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_it_makes_a_repo_for_the_hub(trained, tmp_path):
    with made_repo(trained, "me/align") as repo:
        text = (repo / "README.md").read_text()
        assert "calibration.json" in {file.name for file in repo.iterdir()}
    assert 'from_pretrained("me/align")' in text and "pipeline_tag: zero-shot-image-classification" in text


def test_siglip_keeps_its_bias_in_the_config(train):
    folder = train("siglip", "--loss", "siglip") / "alignment"
    assert json.loads((folder / "config.json").read_text())["logit_bias"] == pytest.approx(-10, abs=0.1)
    assert load_dual_encoder(str(folder), "cpu").embed_texts(["a cell"]).shape == (1, 128)


def test_what_is_refused(train, capsys):
    for flags, message in (
        (("--gradient_accumulation_steps", 2), "gradient_accumulation_steps must be 1: a pair is told"),
        (("--depths", 1, 1), "must be one more than depths"),
        (("--corpus_share", 2), "corpus_share must be in"),
    ):
        with pytest.raises(SystemExit):
            train("refused", *flags)
        assert message in capsys.readouterr().err
