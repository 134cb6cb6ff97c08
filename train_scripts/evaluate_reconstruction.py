"""Measure what the model makes of given images: reconstruction, inpainting, super-resolution and denoising.

python train_scripts/evaluate_reconstruction.py --dataset_name bloodmnist --output runs/restoration.json
Real images that the model has not learned from are degraded and restored, by the model and by common methods. Results
go to a JSON file; tables, a plot and a sheet of pictures beside it. What was drawn is kept in a folder of its name, so
that a killed run goes on when it is started again.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from visbio_diffusers import VisBioImg2ImgPipeline, VisBioInpaintPipeline, VisBioRestorationPipeline, evaluation
from visbio_diffusers.captions import load_bank
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.data import load_image_dataset
from visbio_diffusers.evaluation import features as networks
from visbio_diffusers.evaluation.evaluators import find_evaluators
from visbio_diffusers.evaluation.restoration import TASKS, Beholder, distortion, plot_strengths, render_restoration
from visbio_diffusers.files import whole_file
from visbio_diffusers.grid import contact_sheet, save_png
from visbio_diffusers.load import load_pipeline


Method = Callable[[slice], np.ndarray]  # rows -> restored images, uint8 (n, height, width, channels)
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


class Bench:
    """The images, and the ways to degrade and restore them."""

    def __init__(self, config: EvaluateReconstructionConfig):
        pipe, self.facts = load_pipeline(config.model or None)
        pipe.set_progress_bar_config(disable=True)
        self.config, self.side = config, pipe.unet.config.sample_size
        dataset = load_image_dataset(config.dataset_name, config.split, resolution=self.side)
        images = evaluation.as_split(dataset)
        if dataset.bank is None or len(images.labels) <= config.num_images + 1:
            raise ValueError(f"{dataset.name} needs a caption bank, and more than {config.num_images + 1} images")
        self.dataset = dataset.name
        order = np.random.default_rng(config.seed).permutation(len(images.labels))
        rows = order[: config.num_images]
        self.images, self.labels = images.images[rows], images.labels[rows]
        self.others = images.images[order[config.num_images :]]
        bank = load_bank(dataset.bank)
        self.captions = [bank.plain_caption(int(label)) for label in self.labels]
        kinds = VisBioImg2ImgPipeline, VisBioInpaintPipeline, VisBioRestorationPipeline
        self.redraw, self.inpaint, self.restore = (kind(**pipe.components) for kind in kinds)
        for each in (self.redraw, self.inpaint, self.restore):
            each.set_progress_bar_config(disable=True)
        self.empty = pipe.encode_prompt("", do_classifier_free_guidance=False)[0]
        self.rng = np.random.default_rng(config.seed)
        places = self.rng.integers(0, self.side - config.hole + 1, (config.num_images, 2))
        self.holes = [(slice(y, y + config.hole), slice(x, x + config.hole)) for y, x in places]
        self.masks = np.zeros(self.images.shape[:3], np.uint8)
        for mask, hole in zip(self.masks, self.holes):
            mask[hole] = 255

    def ours(self, pipe, given: np.ndarray, captions: bool = False, draw: int = 0, **call) -> Method:
        """Return what a pipeline of ours draws of given images, each from a seed of its own."""

        def method(rows: slice) -> np.ndarray:
            seeds = range(len(self.images))[rows]
            text = {"prompt_embeds": self.empty.expand(len(seeds), -1, -1)}
            text = {"prompt": self.captions[rows]} if captions else text
            generators = [torch.Generator().manual_seed(draw * len(self.images) + seed) for seed in seeds]
            arrays = {name: value[rows] if isinstance(value, np.ndarray) else value for name, value in call.items()}
            steps = {"num_inference_steps": self.config.num_inference_steps, "guidance_scale": 1.0}
            images = pipe(image=given[rows], generator=generators, output_type="np", **text, **steps | arrays).images
            return (images * 255).round().astype(np.uint8)

        return method

    def reconstruction(self) -> tuple[np.ndarray, dict[str, Method]]:
        """Return the images and their reconstructions."""
        strengths = self.config.strengths
        return self.images, {f"{each:g}": self.ours(self.redraw, self.images, strength=each) for each in strengths}

    def inpainting(self) -> tuple[np.ndarray, dict[str, Method]]:
        """Return images with holes, and ways to fill them."""
        from scipy.ndimage import distance_transform_edt
        from skimage.restoration import inpaint_biharmonic

        def nearest(image, mask):
            return image[tuple(distance_transform_edt(mask, return_distances=False, return_indices=True))]

        def biharmonic(image, mask):
            return _to_uint8(inpaint_biharmonic(image, mask > 0, channel_axis=-1))

        given = np.where(self.masks[..., None] > 0, 0, self.images).astype(np.uint8)
        methods = {"nearest pixel": _each(nearest, given, self.masks)}
        methods["biharmonic"] = _each(biharmonic, given, self.masks)
        for name, captions in (("ours, no text", False), ("ours, caption", True)):
            methods[name] = self.ours(self.inpaint, given, captions, mask_image=self.masks[..., None])
        return given, methods

    def super_resolution(self) -> tuple[np.ndarray, dict[str, Method]]:
        """Return reduced images, and ways to enlarge them."""
        factor = self.config.factor
        pixels = torch.from_numpy(self.images).permute(0, 3, 1, 2).float()
        given = F.avg_pool2d(pixels, factor).round().byte().permute(0, 2, 3, 1).numpy()

        def resized(kind):
            size = self.side, self.side
            return lambda image: np.asarray(Image.fromarray(image).resize(size, getattr(Image.Resampling, kind)))

        methods = {kind.lower(): _each(resized(kind), given) for kind in ("BILINEAR", "BICUBIC", "LANCZOS")}
        methods["ours"] = self.ours(self.restore, given, factor=factor)
        return given, methods

    def denoising(self) -> tuple[np.ndarray, dict[str, Method]]:
        """Return noisy images of the last level, and ways to clean those of all levels."""
        from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

        def nl_means(image, std):
            options = {"patch_size": 3, "patch_distance": 7, "h": 0.6 * std, "sigma": std, "channel_axis": -1}
            return _to_uint8(denoise_nl_means(image / 255, **options))

        def total_variation(image, std):
            return _to_uint8(denoise_tv_chambolle(image / 255, weight=0.75 * std, channel_axis=-1))

        methods = {}
        for std in self.config.noise_stds:
            noise = np.random.default_rng(self.config.seed).standard_normal(self.images.shape)
            given = _to_uint8(self.images / 255 + std * noise)
            stds, at = np.full(len(given), std), f"noise {std:g}: "
            methods[f"{at}as it is"] = _each(lambda image: image, given)
            methods[f"{at}non-local means"] = _each(nl_means, given, stds)
            methods[f"{at}total variation"] = _each(total_variation, given, stds)
            call = {"noise_std": std, "num_inference_steps": self.config.denoising_steps}
            draws = [self.ours(self.restore, given, draw=draw, **call) for draw in range(self.config.num_samples)]
            methods[f"{at}ours, sample"] = draws[0]
            methods[f"{at}ours, mean of {len(draws)} samples"] = _mean(draws)
            methods[f"{at}ours, one step"] = self.ours(self.restore, given, **call | {"num_inference_steps": 1})
        return given, methods


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def _each(function: Callable, *arrays: np.ndarray) -> Method:
    """Return a method that takes images one by one."""
    return lambda rows: np.stack([function(*each) for each in zip(*(array[rows] for array in arrays))])


def _mean(draws: list[Method]) -> Method:
    return lambda rows: np.mean([draw(rows) for draw in draws], axis=0).round().astype(np.uint8)


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


def measured(bench: Bench, beholder: Beholder, task: str, images: np.ndarray) -> dict:
    """Return what is measured of restored images."""
    shown, originals = images, bench.images
    if task == "inpainting":
        known = bench.masks == 0
        if not np.array_equal(images[known], bench.images[known]):
            raise ValueError("inpainting has changed pixels that it was given")
        shown, originals = (
            np.stack([each[hole] for each, hole in zip(pictures, bench.holes)]) for pictures in (images, bench.images)
        )
    return {**distortion(shown, originals), "judges": beholder(images)}


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
    bench = Bench(config)
    judges = load_judges(config, bench.side)
    beholder = Beholder(judges, bench.images, bench.labels, bench.others)
    tasks, pictures = {}, {}
    for task in config.tasks:
        given, methods = getattr(bench, task)()
        images = {name: restored(config, bench.facts, task, name, method) for name, method in methods.items()}
        tasks[task] = {name: measured(bench, beholder, task, each) for name, each in images.items()}
        pictures[task] = {"original": bench.images, "given": given, **images}
    own = beholder(bench.images)
    results = {
        **evaluation.environment(),
        **{"dataset": bench.dataset, "split": config.split, "n": config.num_images, "num_others": len(bench.others)},
        "settings": f"{config.num_inference_steps} steps ({config.denoising_steps} in denoising), seed {config.seed}",
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
    evaluation.write_results(results, config.output)
    output, table = Path(config.output), render_restoration(results)
    with whole_file(output.with_suffix(".md")) as temporary:
        temporary.write_text(table, encoding="utf-8")
    save_png(sheet(pictures), output.with_suffix(".png"))
    if "reconstruction" in tasks:
        by_strength = {float(strength): entry for strength, entry in tasks["reconstruction"].items()}
        save_png(plot_strengths(by_strength), output.with_name(f"{output.stem}_strength.png"))
    sys.stdout.write(table)
    return 0


def sheet(pictures: dict[str, dict[str, np.ndarray]], columns: int = 8) -> Image.Image:
    """Return a picture with the first images of each task and method, a row for each."""
    tiles, titles = [], []
    for task, methods in pictures.items():
        for name, images in methods.items():
            tiles += [Image.fromarray(image) for image in images[:columns]]
            titles += [f"{task.replace('_', '-')}: {name}", *[""] * (len(images[:columns]) - 1)]
    return contact_sheet(tiles, titles, columns=min(columns, len(tiles)), tile=84, caption_lines=2)


if __name__ == "__main__":
    run(main, parse(EvaluateReconstructionConfig, {}))
