"""Measure what the model makes of given images: reconstruction, inpainting, super-resolution and denoising.

python train_scripts/evaluate_reconstruction.py --dataset_name bloodmnist --output runs/restoration.json
Real images that the model has not learned from are degraded and restored, by the model and by common methods. Results
go to a JSON file; tables, a plot and sheets of pictures beside it. What was drawn is kept in a folder of its name, so
that a killed run goes on when it is started again.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from visbio_diffusers import evaluation
from visbio_diffusers.captions import load_bank
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.evaluation import features as networks
from visbio_diffusers.evaluation.degraded import Bench, Method
from visbio_diffusers.evaluation.evaluators import find_evaluators
from visbio_diffusers.evaluation.restoration import TASKS, Beholder, distortion, plot_strengths, render_restoration
from visbio_diffusers.files import whole_file
from visbio_diffusers.grid import contact_sheet, save_png
from visbio_diffusers.load import load_pipeline


JUDGES = "cnn3", "simclr"


@dataclass(frozen=True, kw_only=True)
class EvaluateReconstructionConfig:
    """Measure what a model makes of given images."""

    dataset_name: str = field(metadata={"help": "real images with classes"})
    output: str = field(metadata={"help": "JSON file for the results; tables and pictures go beside it"})
    model: str = flag("", "pipeline to measure; default is the one that we ship")
    split: str = flag("test", "split whose images are degraded")
    num_images: int = flag(256, "images to restore, drawn at random; the others are what real means")
    evaluators: str = flag("", "folder of judges; default: the shipped ones that were trained on the train split")
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": f"of {', '.join(TASKS)}"})
    strengths: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.4, 0.6, 0.8], metadata={"help": "of reconstruction"}
    )
    hole: int = flag(12, "side in pixels of what is inpainted")
    factor: int = flag(2, "of super-resolution")
    noise_stds: list[float] = field(default_factory=lambda: [0.1, 0.2], metadata={"help": "of denoising, white is 1"})
    num_inference_steps: int = flag(25, "of a whole sampling")
    denoising_steps: int = flag(5, "of denoising, which takes a short end of a sampling")
    num_samples: int = flag(4, "samples whose mean is measured in denoising")
    batch_size: int = flag(64, "images drawn together")
    seed: int = flag(0, "of images, holes and noise")

    def __post_init__(self) -> None:
        """Refuse tasks that there are not, and images too few to have a covariance."""
        if set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks must be of {', '.join(TASKS)}, got {' '.join(self.tasks)}")
        if self.num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {self.num_images}")


class Originals:
    """The images that are degraded, and others of their set."""

    def __init__(self, config: EvaluateReconstructionConfig, side: int):
        dataset = load_image_dataset(config.dataset_name, config.split, resolution=side)
        found, count = evaluation.as_split(dataset), config.num_images
        if dataset.bank is None or len(found.labels) <= count + 1:
            raise ValueError(f"{dataset.name} needs a caption bank, and more than {count + 1} images")
        order = np.random.default_rng(config.seed).permutation(len(found.labels))
        self.images, self.labels = found.images[order[:count]], found.labels[order[:count]]
        self.others, self.dataset = found.images[order[count:]], dataset.name
        bank = load_bank(dataset.bank)
        self.captions = [bank.plain_caption(int(label)) for label in self.labels]


def degrade(bench: Bench, config: EvaluateReconstructionConfig, task: str) -> tuple[np.ndarray, dict[str, Method]]:
    """Return the images that are given in a task, and the methods."""
    if task == "denoising":
        return bench.denoising(config.noise_stds, config.denoising_steps, config.num_samples)
    settings = {"reconstruction": config.strengths, "inpainting": config.hole, "super_resolution": config.factor}
    return getattr(bench, task)(settings[task])


def restored(config: EvaluateReconstructionConfig, facts: dict, task: str, name: str, method: Method) -> np.ndarray:
    """Return the images of a method; what was restored before is read, batch by batch."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("output", "tasks", "evaluators")}
    folder = Path(config.output).with_suffix("") / evaluation.store_name(settings, facts, task, name)
    batches = []
    for start in tqdm(range(0, config.num_images, config.batch_size), desc=f"{task}: {name}", unit="batch"):
        file = folder / f"{start:06d}.npy"
        if not file.exists():
            with whole_file(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, method(slice(start, min(start + config.batch_size, config.num_images))))
        batches.append(np.load(file, allow_pickle=False))
    return np.concatenate(batches)


def in_holes(bench: Bench, images: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the contents of the holes of inpainted images, and of the originals, whose other pixels must be there."""
    holes = bench.holes(side)
    rest = bench.images.copy()
    for kept, image, hole in zip(rest, images, holes):
        kept[hole] = image[hole]
    if not np.array_equal(rest, images):
        raise ValueError("inpainting has changed pixels that it was given")
    return tuple(np.stack([image[hole] for image, hole in zip(each, holes)]) for each in (images, bench.images))


def load_judges(config: EvaluateReconstructionConfig, side: int) -> dict[str, networks.ImageEncoder]:
    """Return judges that have learned from the train split.

    Raises:
        ValueError: if there are none for this set.
    """
    folder = config.evaluators
    if not folder:
        train = load_image_dataset(config.dataset_name, "train", resolution=side)
        folder = find_evaluators(evaluation.as_split(train))
    if folder is None:
        raise ValueError(
            f"no judges come with this package for {config.dataset_name}: visbio evaluate trains some, and keeps them"
            " beside its results; name their folder by --evaluators"
        )
    return {name: networks.load(Path(folder) / name)[0] for name in JUDGES}


def main(config: EvaluateReconstructionConfig) -> int:
    """Restore, measure, and write results, tables, plot and pictures."""
    pipe, facts = load_pipeline(config.model or None)
    side = pipe.unet.config.sample_size
    real = Originals(config, side)
    bench = Bench(pipe, real.images, real.captions, config.num_inference_steps, config.seed)
    judges = load_judges(config, side)
    beholder = Beholder(judges, real.images, real.labels, real.others)
    output, tasks = Path(config.output), {}
    for task in config.tasks:
        given, methods = degrade(bench, config, task)
        images = {name: restored(config, facts, task, name, method) for name, method in methods.items()}
        tasks[task] = {}
        for name, each in images.items():
            compared = in_holes(bench, each, config.hole) if task == "inpainting" else (each, real.images)
            tasks[task][name] = {**distortion(*compared), "judges": beholder(each)}
        shown = {"original": real.images, "given": given, **images}
        save_png(sheet(shown), output.with_name(f"{output.stem}_{task}.png"))
    own = beholder(real.images)
    results = {
        **evaluation.environment(),
        **{"dataset": real.dataset, "split": config.split, "n": config.num_images, "num_others": len(real.others)},
        "settings": f"{config.num_inference_steps} steps ({config.denoising_steps} in denoising), no guidance, seed"
        f" {config.seed}; holes of {config.hole} x {config.hole} pixels, super-resolution by {config.factor}",
        "judges": {
            name: {
                "sha256": evaluation.weights_hash(judge),
                "floor": own[name]["frechet"]["value"]["value"],
                "recognised": own[name].get("recognised"),
            }
            for name, judge in judges.items()
        },
        "tasks": tasks,
    }
    evaluation.write_results(results, output)
    table = render_restoration(results)
    with whole_file(output.with_suffix(".md")) as temporary:
        temporary.write_text(table, encoding="utf-8")
    if "reconstruction" in tasks:
        by_strength = {float(strength): entry for strength, entry in tasks["reconstruction"].items()}
        save_png(plot_strengths(by_strength), output.with_name(f"{output.stem}_strength.png"))
    sys.stdout.write(table)
    return 0


def sheet(methods: dict[str, np.ndarray], rows: int = 5) -> Image.Image:
    """Return a picture of the first images, a row for each, and of what the methods have made of them."""
    first = [images[:rows] for images in methods.values()]
    tiles = [Image.fromarray(image) for row in zip(*first) for image in row]
    return contact_sheet(tiles, list(methods) * len(first[0]), columns=len(methods), tile=84, caption_lines=3)


if __name__ == "__main__":
    run(main, parse(EvaluateReconstructionConfig, {}))
