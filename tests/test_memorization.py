"""The audit finds planted copies, whatever was done to them, and finds none among images that nobody trained on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visbio_diffusers import load_image_dataset
from visbio_diffusers.data.corpus import read_corpus, split_sentences
from visbio_diffusers.evaluation import features as networks
from visbio_diffusers.evaluation import judges, memorization
from visbio_diffusers.evaluation.audit import AuditConfig, audit
from visbio_diffusers.evaluation.images import as_split


ROOT = Path(__file__).parents[1]
SIZE = 16
FILES = ["audit.json", "closest_pairs.png", "closest_pairs_unseen.png"]


def _blobs(seed, n):
    """Return smooth random colour images (n, SIZE, SIZE, 3), uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(30, 220, size=(n, 6, 6, 3))
    return coarse.repeat(3, axis=1).repeat(3, axis=2)[:, 1 : SIZE + 1, 1 : SIZE + 1].astype(np.uint8)


def _moved(images):
    return np.roll(images, (1, -2), axis=(1, 2))


def _recoloured(images):
    return (255 - 0.6 * (255 - images.astype(float)) * [1.1, 0.9, 1.0]).clip(0, 255).astype(np.uint8)


DISGUISES = {
    "none": lambda images: images,
    "mirrored": lambda images: images[:, :, ::-1],
    "turned": lambda images: np.rot90(images, axes=(1, 2)),
    "moved": _moved,
    "recoloured": _recoloured,
    "all": lambda images: _recoloured(_moved(np.rot90(images[:, ::-1], axes=(1, 2)))),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_disguised_copy_is_traced_to_its_original(disguise):
    bank, unseen = _blobs(0, 80), _blobs(1, 80)
    correlations, rows = memorization.best_matches(np.ascontiguousarray(DISGUISES[disguise](bank[:20])), bank)
    others, _ = memorization.best_matches(unseen, bank)
    assert rows.tolist() == list(range(20))
    assert correlations.min() > 0.95 > others.max() + 0.05


def test_matches_do_not_depend_on_chunks_and_sizes_must_fit():
    bank, queries = _blobs(0, 30), _blobs(2, 21)
    whole, parts = (memorization.best_matches(queries, bank, chunk_size=size) for size in (64, 8))
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-6)
    assert whole[1].tolist() == parts[1].tolist()
    with pytest.raises(ValueError, match="one square size"):
        memorization.best_matches(queries[:, :10], bank)


def test_membership_auc_is_the_mann_whitney_statistic_with_an_interval():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    members, others = rng.normal(0, 1, 200).round(1), rng.normal(0.5, 1, 150).round(1)
    entry = memorization.membership_auc(members, others)
    expected = stats.mannwhitneyu(others, members).statistic / (200 * 150)
    assert entry["value"] == pytest.approx(expected)
    assert entry["low"] < stats.norm.cdf(0.5 / np.sqrt(2)) < entry["high"] and entry["n"] == 350
    covered = 0
    for seed in range(100):
        a, b = np.random.default_rng(seed).normal(size=(2, 60))
        null = memorization.membership_auc(a, b)
        covered += null["low"] <= 0.5 <= null["high"]
    assert 89 <= covered <= 99  # 95 are expected
    with pytest.raises(ValueError, match="at least 2 images"):
        memorization.membership_auc(members[:1], others)


def test_denoising_losses_are_the_training_loss_and_repeatable(tiny_pipeline):
    size = tiny_pipeline.unet.config.sample_size
    images = np.random.default_rng(0).integers(0, 256, (5, size, size, 3)).astype(np.uint8)
    prompts = ["a cell", "a monocyte", "a cell", "a small cell", "a platelet"]
    losses = memorization.denoising_losses(tiny_pipeline, images, prompts)
    again = memorization.denoising_losses(tiny_pipeline, images, prompts, batch_size=2)
    np.testing.assert_allclose(losses, again, rtol=1e-4)
    assert losses.shape == (5,) and (losses > 0).all()
    other = memorization.denoising_losses(tiny_pipeline, images, prompts, seed=9)
    assert not np.allclose(losses, other)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder with a toy set of blobs, and with images to audit: fresh ones, and disguised training images."""
    folder = tmp_path_factory.mktemp("audit")
    labels = np.arange(160) % 8
    splits = {"train": _blobs(0, 160), "test": _blobs(1, 160)}
    arrays = {f"{name}_images": images for name, images in splits.items()}
    arrays |= {f"{name}_labels": labels[:, None] for name in splits}
    np.savez(folder / "bloodmnist_toy.npz", **arrays)
    np.savez(folder / "fresh.npz", train_images=_blobs(2, 80), train_labels=labels[:80])
    np.savez(folder / "copied.npz", train_images=DISGUISES["all"](splits["train"][:80]), train_labels=labels[:80])
    return folder


@pytest.mark.parametrize(("images", "least", "most"), [("fresh.npz", 0.0, 0.15), ("copied.npz", 1.0, 1.0)])
def test_audit_tells_copies_from_fresh_images(images, least, most, workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    config = AuditConfig(dataset_name="bloodmnist_toy.npz", images=images, output=str(tmp_path), device="cpu")
    assert audit(config) == 0
    results = json.loads((tmp_path / "audit.json").read_text())
    assert least <= results["near_copies"]["shape"]["0.05"]["value"] <= most
    assert results["n"] == 80 and results["n_unseen"] == 160 and results["membership_inference"] is None
    with Image.open(tmp_path / "closest_pairs.png") as sheet:
        assert sheet.size[0] == 8 * 128 and sheet.size[1] > 6 * 120  # 24 pairs, four in a row


def test_audit_also_looks_in_features_of_a_judge(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    with np.load("bloodmnist_toy.npz") as toy:
        train, labels = toy["train_images"], toy["train_labels"][:80, 0]
    networks.save(judges.train_encoder(train, steps=4, seed=0, width=8, batch_size=32), tmp_path / "simclr", {})
    np.savez(tmp_path / "exact.npz", train_images=train[:80], train_labels=labels)
    rates = {}
    for name, images in (("exact", str(tmp_path / "exact.npz")), ("fresh", "fresh.npz")):
        settings = {"dataset_name": "bloodmnist_toy.npz", "images": images, "evaluators": str(tmp_path)}
        audit(AuditConfig(output=str(tmp_path / name), device="cpu", **settings))
        rates[name] = json.loads((tmp_path / name / "audit.json").read_text())["near_copies"]["features"]["0.05"]
    assert rates["exact"]["value"] == 1 and rates["fresh"]["value"] < 0.2


def test_audit_of_a_model_asks_it_what_it_was_trained_on(workspace, tiny_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    settings = {"num_images": 16, "num_members": 40, "batch_size": 8, "device": "cpu"}
    config = AuditConfig(
        dataset_name="bloodmnist_toy.npz", model=str(tiny_pipeline_dir), output=str(tmp_path / "out"), **settings
    )
    assert audit(config) == 0
    results = json.loads((tmp_path / "out" / "audit.json").read_text())
    auc = results["membership_inference"]["auc"]
    assert auc["n"] == 80 and auc["low"] < 0.5 < auc["high"]  # it was trained on neither
    assert results["model_sha256"] and results["n"] == 16
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == FILES


def image_folder(folder, split, images, labels, texts):
    """Write a split of a folder whose images have labels and captions, the captions in turn."""
    (folder / split).mkdir(parents=True)
    rows = []
    for number, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image).save(folder / split / f"{number:04d}.png")
        text = texts[number % len(texts)]
        rows.append({"file_name": f"{number:04d}.png", "text": text, "label": f"class {label}"})
    (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.slow
def test_a_model_that_has_learned_a_hundred_images_by_heart_is_caught(visbio_data, tmp_path):
    """Our own script on 100 images, each with a caption of its own, 384 epochs; beside it, real images nobody saw."""
    texts = read_corpus(str(visbio_data / "pubmed" / "abstracts.jsonl"))
    firsts = dict.fromkeys(split_sentences(text)[0] for text in texts)
    captions = [sentence for sentence in firsts if 6 <= len(sentence.split()) <= 14][:100]
    source = str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz")
    parts = {split: as_split(load_image_dataset(source, split)) for split in ("train", "val", "test")}
    folder = tmp_path / "images"
    for split, count in (("train", 100), ("test", 256)):
        image_folder(folder, split, parts[split].images[:count], parts[split].labels[:count], captions)
    shape = {"block_out_channels": [32, 64, 128], "layers_per_block": 1, "num_transformer_layers": 2, "film_dim": 128}
    settings = {
        "dataset_name": folder, "output_dir": tmp_path / "run", "unet_config": json.dumps(shape),
        "train_batch_size": 32, "learning_rate": 2e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 50,
        "ema_decay": 0.99, "max_train_steps": 1200, "validation_steps": 0, "report_to": "none",
    }  # fmt: skip
    script = ROOT / "train_scripts" / "train_text_to_image.py"
    subprocess.run([sys.executable, script, *(f"--{name}={value}" for name, value in settings.items())], check=True)
    unseen = parts["val"]
    np.savez(tmp_path / "unseen.npz", train_images=unseen.images[:256], train_labels=unseen.labels[:256])
    common = {"dataset_name": str(folder), "num_images": 128, "num_members": 100}
    audit(AuditConfig(model=str(tmp_path / "run" / "pipeline"), output=str(tmp_path / "model"), **common))
    audit(AuditConfig(images=str(tmp_path / "unseen.npz"), output=str(tmp_path / "unseen"), **common))
    planted, clean = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("model", "unseen"))
    for space in ("pixels", "shape"):
        assert planted["near_copies"][space]["0.01"]["low"] > 0.5
        assert clean["near_copies"][space]["0.01"]["low"] <= 0.01
    assert planted["membership_inference"]["auc"]["low"] > 0.9
