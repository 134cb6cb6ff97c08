"""The evaluation: closed forms, references, planted copies and collapses, and the script as a user runs it."""

import dataclasses
import json
import math
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageFilter

from visbio_diffusers import VisBioPipeline, cli, load_bank, load_image_dataset
from visbio_diffusers.config import parse, run
from visbio_diffusers.data import ImageDataset
from visbio_diffusers.evaluation import evaluators as panel
from visbio_diffusers.evaluation import features as networks
from visbio_diffusers.evaluation import judges, memorization, metrics, protocol, report
from visbio_diffusers.evaluation.benchmark import EvaluateConfig, check_independent, evaluate
from visbio_diffusers.evaluation.images import Split, as_split, no_larger, read_images, save_images
from visbio_diffusers.evaluation.sampling import balanced_labels, draw_on_cores, generate_images, heldout_prompts


NAMES = load_bank("bloodmnist").class_names


def toy_images(num_images: int, seed: int) -> Split:
    """Return 8 x 8 pixel images of a disc at a random place on grey; its colour is the class."""
    rng = np.random.default_rng(seed)
    labels = balanced_labels(num_images, len(NAMES))
    rows, columns = np.mgrid[:8, :8]
    centres = rng.uniform(2, 6, size=(num_images, 2, 1, 1))
    disc = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < 8
    corners = np.array([[red, green, blue] for red in (40, 220) for green in (40, 220) for blue in (40, 220)])
    images = np.where(disc[..., None], corners[labels][:, None, None], 128) + rng.normal(0, 25, (num_images, 8, 8, 3))
    return Split(images.clip(0, 255).astype(np.uint8), labels)


@pytest.fixture(scope="module")
def evaluator_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluators")


@pytest.fixture(scope="module")
def reference(evaluator_folder):
    train, test = toy_images(480, 0), toy_images(240, 1)
    evaluators = panel.load_evaluators(evaluator_folder, train, test, len(NAMES), 40)
    dataset = ImageDataset("toy", "train", train.images, train.labels, class_names=NAMES, bank="bloodmnist")
    panel.load_aligner(evaluator_folder, dataset, train, 120)
    return protocol.make_reference(NAMES, train, test, evaluators, balanced_labels(160, len(NAMES)))


# Metrics


def test_share_has_the_wilson_interval():
    """By hand for 8 of 10: centre (0.8 + 0.1921) / 1.3841 = 0.7167, half width 0.2265; for 0 of 10 from 0 up."""
    entry = metrics.proportion_interval(8, 10)
    assert (entry["value"], entry["n"]) == (0.8, 10)
    assert (entry["low"], entry["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert metrics.proportion_interval(0, 10)["low"] == 0
    assert metrics.proportion_interval(0, 10)["high"] == pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6)


def test_fidelity_counts_the_confusions():
    entry = metrics.fidelity(np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1]), ("a", "b", "absent"))
    assert entry["confusion"] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert entry["overall"]["value"] == 0.5 and set(entry["per_class"]) == {"a", "b"}


def test_frechet_distance_of_two_gaussians():
    """Commuting covariances: |dm|^2 + sum (s_a - s_b)^2. One turned by 45 degrees against a closed form for 2 x 2."""
    mean = torch.tensor([1.0, 2.0], dtype=torch.float64)
    first, second = torch.diag(torch.tensor([4.0, 9.0]).double()), torch.diag(torch.tensor([1.0, 16.0]).double())
    assert metrics.frechet_distance(mean, first, 0 * mean, second) == pytest.approx(5 + 1 + 1)
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    turned = turn @ second @ turn.T
    # tr (A B)^1/2 = sqrt(tr(AB) + 2 sqrt(det(AB))) for 2 x 2
    product = first @ turned
    cross = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(first.trace() + second.trace() - 2 * cross)
    assert metrics.frechet_distance(mean, first, mean, turned) == pytest.approx(expected)


def test_frechet_distance_equals_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(300, 8)), 0.3 + rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8))

    class Identity(torch.nn.Module):
        num_features = 8

        def forward(self, features):
            return features

    metric = fid.FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    metric.update(torch.tensor(real), real=True)
    metric.update(torch.tensor(fake), real=False)
    ours = metrics.frechet_distance(*metrics.moments(fake), *metrics.moments(real))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_class_weights_bring_the_shares_of_the_other_set():
    labels, target = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1])
    weights = metrics.class_weights(labels, target)
    assert weights == pytest.approx([1 / 12] * 3 + [3 / 4])
    mean, covariance = metrics.moments(np.array([[0.0], [0.0], [0.0], [1.0]]), weights)
    assert float(mean) == pytest.approx(0.75)
    assert float(covariance) == pytest.approx(0.75 * 0.25 / (1 - (3 / 144 + 9 / 16)))
    plain = np.random.default_rng(0).normal(size=(20, 3))
    assert metrics.moments(plain)[1].numpy() == pytest.approx(np.cov(plain.T))
    with pytest.raises(ValueError, match="class 2 has no real images"):
        metrics.class_weights(labels, np.array([2]))


def test_frechet_ratio_of_real_sets_is_one_within_its_interval_and_rises_with_a_shift():
    rng = np.random.default_rng(0)
    real, *draws = rng.normal(size=(41, 300, 8))
    weights = np.full(300, 1 / 300)
    floors = [(draw, weights) for draw in draws[:20]]
    entries = [metrics.frechet_with_floor(draw, floors, real, weights) for draw in draws[20:]]
    covered = [entry["ratio"]["low"] < 1 < entry["ratio"]["high"] for entry in entries]
    assert sum(covered) >= 16  # of 20; 19 are expected
    by_hand = [metrics.frechet_distance(*metrics.moments(draw), *metrics.moments(real)) for draw in draws[:20]]
    assert entries[0]["floor"]["value"] == pytest.approx(np.mean(by_hand))
    shifted = metrics.frechet_with_floor(draws[20] + 1, floors, real, weights)
    expected = entries[0]["value"]["value"] + 8 + 2 * (draws[20].mean(axis=0) - real.mean(axis=0)).sum()
    assert shifted["value"]["value"] == pytest.approx(expected)
    assert shifted["ratio"]["low"] > 10


def test_within_class_distance_of_shrunk_and_collapsed_classes():
    rng = np.random.default_rng(0)
    real, labels = rng.normal(size=(200, 6)), np.arange(200) % 2
    scales = np.array([0.5, 0.7])
    entry = metrics.within_class_distance(real * scales[labels][:, None] + 3, labels, real, labels, ("a", "b"))
    assert [entry["per_class"][name]["value"] for name in "ab"] == pytest.approx([0.5, 0.7], rel=1e-4)
    assert entry["ratio"]["value"] == pytest.approx(0.6, rel=1e-4)
    assert entry["ratio"]["low"] < 0.6 < entry["ratio"]["high"] < 0.7
    other = np.random.default_rng(1).normal(size=(200, 6))
    same = metrics.within_class_distance(other, labels, real, labels, ("a", "b"))["ratio"]
    assert same["low"] < 1 < same["high"]
    collapsed = metrics.within_class_distance(np.ones((200, 6)), labels, real, labels, ("a", "b"))
    assert collapsed["ratio"]["value"] == collapsed["ratio"]["high"] == 0
    assert metrics.within_class_distance(real[:1], labels[:1], real, labels, ("a", "b"))["ratio"] is None
    few = metrics.within_class_distance(other[:5], labels[:5], real[:5], labels[:5], ("a", "b"))  # 3 and 2 images
    assert 0 < few["ratio"]["low"] < few["ratio"]["high"] < 10


# Memorization


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_nearest_distances_equal_brute_force_and_are_zero_for_copies(dtype):
    rng = np.random.default_rng(0)
    bank = rng.integers(0, 256, size=(50, 4, 4, 3)).astype(dtype)
    queries = np.concatenate([bank[[7, 3]], rng.integers(0, 256, size=(9, 4, 4, 3)).astype(dtype)])
    distances, rows = memorization.nearest_distances(queries, bank, chunk_size=4)
    differences = (queries[:, None].astype(float) - bank[None]) / (255 if dtype == np.uint8 else 1)
    table = np.sqrt((differences**2).sum(axis=(2, 3, 4)))
    assert rows.tolist() == table.argmin(axis=1).tolist() and rows[:2].tolist() == [7, 3]
    assert distances == pytest.approx(table.min(axis=1), rel=1e-5)
    assert distances[:2].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"\(4, 4, 3\) cannot be compared with training \(2, 2, 3\)"):
        memorization.nearest_distances(queries, bank[:, :2, :2])


def test_near_copies_at_matched_quantile():
    unseen, weights = np.arange(1.0, 101.0), np.full(100, 0.01)
    own = memorization.near_copies(unseen, unseen, weights)
    assert 0 <= own["0.01"]["value"] <= 0.01 and 0.03 <= own["0.05"]["value"] <= 0.05
    planted = memorization.near_copies(np.r_[np.zeros(30), np.full(70, 50.0)], unseen, weights)
    assert planted["0.01"]["value"] == planted["0.05"]["value"] == 0.3
    heavy = np.r_[np.full(10, 0.09), np.full(90, 0.1 / 90)]  # the nearest ten stand for nine tenths of the set
    assert memorization.near_copies(unseen, unseen, heavy)["0.05"]["threshold"] == 1


# Classifier


def test_classifier_learns_repeats_and_survives_saving(tmp_path):
    train, test = toy_images(320, 0), toy_images(160, 1)
    settings = {"num_classes": len(NAMES), "steps": 80, "seed": 3, "width": 12, "batch_size": 32}
    model = judges.train_classifier(train.images, train.labels, **settings)
    answers = networks.predictions(model, networks.features(model, test.images))
    assert (answers == test.labels).mean() > 0.9
    again = judges.train_classifier(train.images, train.labels, **settings)
    assert networks.weights_hash(again) == networks.weights_hash(model)
    other = judges.train_classifier(train.images, train.labels, **{**settings, "seed": 4})
    assert networks.weights_hash(other) != networks.weights_hash(model)

    networks.save(model, tmp_path / "judge", {"steps": 60})
    loaded, training = networks.load(tmp_path / "judge")
    assert training == {"steps": 60}
    assert networks.features(loaded, test.images).tolist() == networks.features(model, test.images).tolist()
    weights = tmp_path / "judge" / networks.WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="judge is damaged"):
        networks.load(tmp_path / "judge")
    with pytest.raises(FileNotFoundError, match="holds no evaluator"):
        networks.load(tmp_path)


def test_an_encoder_learns_without_labels_and_survives_saving(tmp_path):
    train, test = toy_images(320, 0), toy_images(160, 1)
    settings = {"seed": 3, "width": 12, "batch_size": 64}
    model, again = (judges.train_encoder(train.images, steps=60, **settings) for _ in range(2))
    assert networks.weights_hash(model) == networks.weights_hash(again)
    networks.save(model, tmp_path / "encoder", {})
    loaded, _ = networks.load(tmp_path / "encoder")
    known, asked = (torch.tensor(networks.features(loaded, split.images)) for split in (train, test))
    nearest = torch.cdist(asked, known).argmin(dim=1)
    assert (train.labels[nearest] == test.labels).mean() > 0.7  # 0.125 by chance
    views = torch.eye(4).repeat(2, 1)
    assert judges.contrastive_loss(views) < judges.contrastive_loss(views.roll(1, 0)[[0, 2, 1, 3, 4, 5, 6, 7]])


def test_classifier_takes_any_size_and_grey_and_refuses_wrong_labels():
    model = networks.ImageClassifier(num_classes=3, in_channels=1, width=8, kernel_size=5).eval()
    for size in (9, 28, 33):
        assert networks.features(model, np.zeros((2, size, size, 1), np.uint8)).shape == (2, 16)
    with pytest.raises(ValueError, match="4 integers in 0 to 2"):
        judges.train_classifier(
            np.zeros((4, 9, 9, 1), np.uint8), np.array([0, 1, 2, 3]), num_classes=3, steps=1, seed=0
        )


def test_augmentation_is_repeatable_and_keeps_left_and_right_apart_on_demand():
    pixel_values = torch.full((64, 1, 28, 28), -0.5)
    pixel_values[..., :14] = 0.5  # bright on the left
    views = [judges.augment(pixel_values, torch.Generator().manual_seed(0), flip) for flip in (True, True, False)]
    assert torch.equal(views[0], views[1])
    left_is_brighter = [view[..., :10].mean(dim=(1, 2, 3)) > view[..., 18:].mean(dim=(1, 2, 3)) for view in views]
    assert left_is_brighter[2].all() and 5 < left_is_brighter[0].sum() < 59


# Protocol and report


def test_protocol_tells_real_from_shuffled_blurred_collapsed_and_copied(reference):
    fresh = toy_images(160, 2)
    rng = np.random.default_rng(0)
    sets = {
        "fresh": fresh,
        "copied": protocol.real_training_images(reference),
        "shuffled": Split(fresh.images, rng.permutation(fresh.labels)),
        "collapsed": Split(fresh.images[fresh.labels], fresh.labels),
    }
    results = {name: protocol.measure(split, reference) for name, split in sets.items()}
    for judge in ("cnn3", "cnn5"):
        entries = {name: result["evaluators"][judge] for name, result in results.items()}
        fidelity = {name: entry["fidelity"]["overall"]["value"] for name, entry in entries.items()}
        assert fidelity["fresh"] > 0.9 and fidelity["shuffled"] < 0.3
        diversity = {name: entry["within_class_distance"]["ratio"] for name, entry in entries.items()}
        assert 0.8 < diversity["fresh"]["value"] < 1.2 and diversity["collapsed"]["value"] == 0
        assert diversity["copied"]["value"] == 1
        among_recognised = entries["shuffled"]["recognised_within_class_distance"]["ratio"]["value"]
        assert diversity["shuffled"]["value"] > 1.5 and 0.6 < among_recognised < 1.4
        ratios = {name: entry["frechet"]["ratio"]["value"] for name, entry in entries.items()}
        assert 0.3 < ratios["fresh"] < 3 and 0.3 < ratios["copied"] < 3 < ratios["collapsed"]
        copies = {name: entry["near_copies"]["0.05"]["value"] for name, entry in entries.items()}
        assert copies["copied"] == 1 and copies["fresh"] < 0.15
    pixel_copies = {name: result["near_copies_pixels"]["0.05"]["value"] for name, result in results.items()}
    assert pixel_copies["copied"] == 1 and pixel_copies["fresh"] < 0.15


def test_score_of_training_on_images_falls_with_shuffled_labels(reference):
    real = protocol.real_training_images(reference)
    assert np.bincount(real.labels).tolist() == [20] * 8
    good = protocol.classification_accuracy_score(real, reference, steps=40)
    shuffled = Split(real.images, np.random.default_rng(0).permutation(real.labels))
    assert good["value"] > 0.8 and good["num_training_images"] == 160
    assert protocol.classification_accuracy_score(shuffled, reference, steps=40)["value"] < 0.4


def test_evaluators_of_other_images_are_refused(evaluator_folder, reference):
    other = toy_images(480, 5)
    with pytest.raises(ValueError, match="trained on other images"):
        panel.load_evaluators(evaluator_folder, other, reference.test, len(NAMES), 1)


def test_interval_of_clustered_hits_is_that_of_the_clusters():
    """40 prompts of 25 images each, all right or all wrong: as wide as 40 images would be, not 1,000."""
    hits = np.repeat(np.arange(40) % 4 > 0, 25)
    clusters = [str(index) for index in np.repeat(np.arange(40), 25)]
    entry, alone = metrics.cluster_interval(hits, clusters), metrics.proportion_interval(30, 40)
    assert entry["low"] == pytest.approx(alone["low"], abs=0.05)
    assert entry["high"] == pytest.approx(alone["high"], abs=0.05)


def test_classes_of_which_there_are_few_are_few_on_all_sides(reference):
    labels = balanced_labels(160, len(NAMES))
    few = Split(reference.test.images[4:], reference.test.labels[4:])
    few = Split(few.images[few.labels != 2], few.labels[few.labels != 2])
    some = Split(np.concatenate([few.images, reference.test.images[[2, 10, 18]]]), np.r_[few.labels, [2, 2, 2]])
    shortened = protocol.make_reference(NAMES, reference.train, some, [], labels)
    assert np.bincount(shortened.common).tolist() == [20, 20, 3, *[20] * 5]
    assert (np.sort(some.labels[shortened.matched_test]) == shortened.common).all()


def test_heldout_prompts_go_through_the_captions_of_each_class():
    bank = load_bank("bloodmnist")
    labels = balanced_labels(64, len(NAMES))
    prompts = heldout_prompts(bank, labels)
    for index, (label, prompt) in enumerate(zip(labels, prompts, strict=True)):
        assert prompt == bank.heldout_captions(int(label))[index // len(NAMES) // 4]  # four images of each
    assert len(set(prompts)) == 8 * 2


def test_images_come_back_from_a_file_and_wrong_files_are_refused(tmp_path):
    generated = toy_images(16, 0)
    save_images(tmp_path / "drawn.npz", generated, ["a cell"] * 16)
    again = read_images(tmp_path / "drawn.npz", NAMES)
    assert (again.images == generated.images).all() and (again.labels == generated.labels).all()
    with pytest.raises(ValueError, match="labels outside 0 to 2"):
        read_images(tmp_path / "drawn.npz", ("a", "b", "c"))
    np.savez(tmp_path / "wrong.npz", pictures=generated.images)
    with pytest.raises(ValueError, match="has no train_images and train_labels: its keys are pictures"):
        read_images(tmp_path / "wrong.npz", NAMES)


def test_larger_images_are_reduced_to_the_real_ones():
    toy = toy_images(8, 0)
    real = ImageDataset("toy", "test", toy.images, toy.labels)
    assert no_larger(toy, real) is toy
    large = Split(toy.images.repeat(4, axis=1).repeat(4, axis=2), toy.labels)
    reduced = no_larger(large, real)
    assert reduced.images.shape == (8, 8, 8, 3) and (reduced.labels == toy.labels).all()
    assert np.abs(reduced.images.astype(int) - toy.images).mean() < 12
    small = Split(toy.images[:, :4, :4], toy.labels)
    assert no_larger(small, real) is small


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "results.json"
    report.write_results({"value": 1}, path)
    with pytest.raises(ValueError):
        report.write_results({"value": float("nan")}, path)
    assert json.loads(path.read_text()) == {"value": 1}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_command_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/.venv/bin/visbio", "evaluate", "--output", "a b.json"])
    assert report.environment()["command"] == "visbio evaluate --output 'a b.json'"
    monkeypatch.setattr("sys.argv", ["train_scripts/evaluate.py", "--fast"])
    assert report.environment()["command"] == "python train_scripts/evaluate.py --fast"


def test_git_state_of_a_checkout_and_of_an_installed_package(tmp_path):
    assert report.git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    state = report.git_state(tmp_path)
    assert len(state["commit"]) == 40 and not state["dirty"]
    (tmp_path / "file").touch()
    assert report.git_state(tmp_path)["dirty"]


# The script


def test_a_killed_drawing_goes_on_and_a_damaged_batch_is_named(workspace, tmp_path):
    pipe = VisBioPipeline.from_pretrained(workspace / "pipeline")
    draw = partial(generate_images, pipe, ["a cell"] * 5, 7, 2, store=tmp_path / "store", num_inference_steps=2)
    whole = draw().images
    assert len(list((tmp_path / "store").iterdir())) == 3
    (tmp_path / "store" / "00000002.npz").unlink()
    pipe.unet = None  # batches that are there are not drawn again
    with pytest.raises(AttributeError):
        draw()
    pipe = VisBioPipeline.from_pretrained(workspace / "pipeline")
    again = generate_images(pipe, ["a cell"] * 5, 7, 2, store=tmp_path / "store", num_inference_steps=2)
    assert (again.images == whole).all() and again.seconds_per_image > 0
    (tmp_path / "store" / "00000004.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="00000004.npz is damaged: delete it"):
        draw()


def test_processes_draw_what_one_draws(workspace, tmp_path):
    pipe = VisBioPipeline.from_pretrained(workspace / "pipeline")
    prompts, options = ["a cell", "a monocyte", "a cell"], {"num_inference_steps": 2}
    alone = generate_images(pipe, prompts, 7, 1, **options).images
    draw_on_cores((str(workspace / "pipeline"), "cpu"), prompts, 7, 1, tmp_path, 2, **options)
    pipe.unet = None  # nothing is left to draw
    assert (generate_images(pipe, prompts, 7, 1, store=tmp_path, **options).images == alone).all()
    with pytest.raises(ValueError, match="num_inference_steps"):
        draw_on_cores((str(workspace / "pipeline"), "cpu"), prompts, 8, 1, tmp_path / "new", 2, num_inference_steps=0)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, reference, evaluator_folder, tiny_pipeline_dir):
    """Return a folder with the toy set, its evaluators and an untrained pipeline."""
    folder = tmp_path_factory.mktemp("workspace")
    splits = {"train": reference.train, "test": reference.test}
    arrays = {f"{name}_images": split.images for name, split in splits.items()}
    np.savez(folder / "bloodmnist_toy.npz", **arrays, **{f"{k}_labels": v.labels[:, None] for k, v in splits.items()})
    (folder / "evaluators").symlink_to(evaluator_folder)
    (folder / "pipeline").symlink_to(tiny_pipeline_dir)
    return folder


def test_an_image_depends_on_its_seed_and_not_on_the_batch(workspace):
    pipe = VisBioPipeline.from_pretrained(workspace / "pipeline")
    drawn = [generate_images(pipe, ["a cell"] * 5, 7, size, num_inference_steps=2).images for size in (5, 2)]
    assert drawn[0].dtype == np.uint8 and drawn[0].shape == (5, 8, 8, 3)
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1
    assert (drawn[0][0] != drawn[0][1]).any()


def run_script(*arguments: str) -> str | int:
    """Evaluate on the toy set as the script does; return what its process would exit with: a number or a message."""
    common = ["--dataset_name", "bloodmnist_toy.npz", "--evaluators", "evaluators"]
    with pytest.raises(SystemExit) as exited:
        run(evaluate, parse(EvaluateConfig, {}, [*common, *arguments]))
    return exited.value.code


def test_script_measures_a_model_at_two_guidance_scales_and_its_images_again(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    sweep = ["--guidance_scale", "1", "2", "--guidance_interval", "0.2", "0.8", "--num_inference_steps", "2"]
    model = ["--model", "pipeline", "--num_images", "32", "--num_wording_images", "16", "--keep"]
    assert run_script(*model, *sweep, "--output", "out/sweep.json") == 0
    results = json.loads(Path("out/sweep.json").read_text())
    assert [entry["guidance_scale"] for entry in results["runs"]] == [1, 2]
    assert [entry["num_inference_steps"] for entry in results["runs"]] == [2, 2]
    assert all(len(entry["heldout_wording"]["cnn3"]["per_prompt"]) == 8 for entry in results["runs"])
    assert all(entry["seconds_per_image"] > 0 and entry["peak_memory_gb"] > 0 for entry in results["runs"])
    assert {"versions", "git", "hardware", "command", "seed", "wall_clock_seconds"} <= set(results)
    assert all(entry["heldout_wording_alignment"]["score"]["n"] == 16 for entry in results["runs"])
    assert results["alignment_evaluator"]["real_test"]["retrieval"]["value"] > 0.5
    table = Path("out/sweep.md").read_text()
    for entry in results["runs"]:
        for judge in panel.EVALUATORS:
            assert f"{entry['evaluators'][judge]['frechet']['value']['value']:.3f}" in table
    assert "Generated, guidance 2" in table and "(CAS)" not in table and "Coverage (cnn5)" in table
    assert not Path("out/sweep.images").exists()

    kept = "out/sweep-guidance-2.npz"
    assert run_script("--images", kept, "--cas", "--cas_steps", "5", "--output", "out/images.json") == 0
    again = json.loads(Path("out/images.json").read_text())
    assert again["runs"][0]["evaluators"] == results["runs"][1]["evaluators"]
    assert "(CAS)" in Path("out/images.md").read_text()


def test_an_adapter_is_measured_beside_its_base_on_a_set_with_captions_of_its_own(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    for split, number in (("train", 40), ("test", 24)):
        folder = Path("captioned", split)
        folder.mkdir(parents=True)
        toys = toy_images(number, number)
        for index, (image, label) in enumerate(zip(*vars(toys).values(), strict=True)):
            Image.fromarray(image).save(folder / f"{index}.png")
            row = {"file_name": f"{index}.png", "text": f"cell {index} of {split}", "label": NAMES[label]}
            with (folder / "metadata.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    pipe = VisBioPipeline.from_pretrained("pipeline")
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["conv_out"], init_lora_weights=False))
    VisBioPipeline.save_lora_weights("adapter", unet_lora_layers=get_peft_model_state_dict(pipe.unet))

    model = ["--model", "pipeline", "--lora", "adapter", "--lora_scale", "0", "1", "--keep"]
    settings = ["--num_images", "30", "--num_inference_steps", "2", "--num_processes", "2", "--evaluator_steps", "2"]
    arguments = ["--dataset_name", "captioned", "--evaluators", "of-captioned", "--output", "out/adapter.json"]
    with pytest.raises(SystemExit) as exited:
        run(evaluate, parse(EvaluateConfig, {}, [*model, *settings, *arguments]))
    assert exited.value.code == 0
    results = json.loads(Path("out/adapter.json").read_text())
    assert [entry["lora_scale"] for entry in results["runs"]] == [0, 1] and results["lora"] == "adapter"
    assert "heldout_wording" not in results["runs"][0] and results["alignment_evaluator"]["real_test"]
    kept = [np.load(f"out/adapter-guidance-1.35-adapter-{scale}.npz") for scale in (0, 1)]
    prompts = kept[0]["prompts"].tolist()
    assert set(prompts) == {f"cell {index} of test" for index in range(24)} and len(prompts) == 30
    assert (kept[0]["train_images"] != kept[1]["train_images"]).any()
    base = generate_images(VisBioPipeline.from_pretrained("pipeline"), prompts, 0, num_inference_steps=2).images
    assert np.abs(base.astype(int) - kept[0]["train_images"]).max() <= 1
    assert "without adapter" in Path("out/adapter.md").read_text()


def test_command_line_measures_images_also_with_an_extractor_of_ones_own(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    save_images("drawn.npz", toy_images(32, 7), ["a cell"] * 32)
    torch.jit.script(_Means()).save("means.pt")
    flags = ["--dataset_name", "bloodmnist_toy.npz", "--images", "drawn.npz", "--evaluators", "evaluators"]
    flags += ["--device", "cpu", "--output", "cli/results.json"]
    assert cli.main(["evaluate", *flags, "--extractors", "means.pt"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "cli/results.json"
    results = json.loads(Path("cli/results.json").read_text())
    assert set(results["runs"][0]["evaluators"]) == {*panel.EVALUATORS, "means"}
    assert "FD-means to real test images" in Path("cli/results.md").read_text()
    page = Path("cli/results.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.replace("http://www.w3.org", "")
    for judge in ("cnn3", "cnn5"):
        assert f"Recognised as their class by {judge}" in page
    with pytest.raises(SystemExit) as wrong:
        cli.main(["evaluate", "--imags", "x"])
    assert wrong.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert cli.main(["evaluate", *flags, "--extractors", "nowhere"]) == 1
    assert "no extractor nowhere" in capsys.readouterr().err


class _Means(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model or --images"),
        (["--images", "x.npz", "--output", "r.html"], "output must be a file that ends in .json"),
        (["--images", "x.npz", "--device", "gpu"], "no device 'gpu' on this machine: it has cpu"),
        (["--model", "pipeline", "--extractors", "nowhere.pt"], "no extractor nowhere.pt"),
        (["--images", "nothing.npz"], "nothing.npz"),
        (["--images", "missing.npz"], "no file missing.npz"),
        (["--images", "x.npz", "--guidance_scale", "2"], "need --model"),
    ],
)
def test_script_refuses_in_one_line(workspace, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(workspace)
    code = run_script("--output", "refused.json", *arguments)
    complaint = code if isinstance(code, str) else capsys.readouterr().err
    assert code != 0 and message in complaint and len(complaint.splitlines()) == 1
    assert not Path("refused.json").exists()


# Real images


def test_shipped_judges_know_real_images_sharp_and_blurred(visbio_data):
    """The classifiers must not live on sharpness, in which generated images differ from real ones."""
    path = str(visbio_data / "medmnist" / "bloodmnist_rebuilt_28.npz")
    train, test = (as_split(load_image_dataset(path, split)) for split in ("train", "test"))
    folder = panel.find_evaluators(train)
    assert folder is not None and panel.find_evaluators(toy_images(8, 0)) is None
    some, labels = test.images[:600], test.labels[:600]
    pictures = [Image.fromarray(image) for image in some]
    views = {
        "sharp": some,
        "blurred": np.stack([np.asarray(image.filter(ImageFilter.GaussianBlur(0.7))) for image in pictures]),
        "resized": np.stack([np.asarray(image.resize((24, 24)).resize((28, 28))) for image in pictures]),
    }
    for name in ("cnn3", "cnn5"):
        model, _ = networks.load(folder / name)
        right = {
            k: (networks.predictions(model, networks.features(model, v)) == labels).mean() for k, v in views.items()
        }
        assert right["sharp"] > 0.93 and min(right["blurred"], right["resized"]) > 0.85
    model, _ = networks.load(folder / "simclr")
    known, asked = (torch.tensor(networks.features(model, split)) for split in (train.images[::4], some))
    assert (train.labels[::4][torch.cdist(asked, known).argmin(dim=1)] == labels).mean() > 0.7


def test_a_reward_is_no_judge_of_what_it_tuned(reference):
    judge = reference.evaluators[0]
    facts = {"reward_sha256": f"abc, {networks.weights_hash(judge.model)}"}
    check_independent(reference.evaluators, {})
    with pytest.raises(ValueError, match="evaluator cnn3 was the reward"):
        check_independent(reference.evaluators, facts)


def test_a_classifier_that_was_the_reward_is_no_extractor(reference, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from visbio_diffusers.rewards import find_reward

    folder = tmp_path / "vit"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
    facts = {"reward_sha256": ", ".join(find_reward(f"classifier:{folder}").sha256)}
    judge = dataclasses.replace(reference.evaluators[0], name="vit", training={"source": str(folder)})
    with pytest.raises(ValueError, match="evaluator vit was the reward"):
        check_independent([judge], facts)
    check_independent([judge], {"reward_sha256": "another"})
