"""Find the sampler of a model: how near to real images each comes, after how many steps, at which guidance.

python train_scripts/evaluate_samplers.py --model runs/micro-64/pipeline --dataset_name pbc64 \
    --caption_bank bloodmnist --output samplers.json
Every combination of what is given is drawn from the same noise and measured against the test split. A plot of the
distance against the steps goes beside the results. A killed run goes on with the combinations that are missing.
"""

import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from visbio_diffusers import evaluation, load_bank, load_image_dataset
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.evaluation.evaluators import images_hash
from visbio_diffusers.evaluation.features import features, predictions
from visbio_diffusers.evaluation.metrics import class_weights, frechet_distance, moments, within_class_distance
from visbio_diffusers.evaluation.plots import plot_curves
from visbio_diffusers.evaluation.protocol import match_classes
from visbio_diffusers.evaluation.samplers import SAMPLERS, cheapest, curves, make_sampler, save_defaults
from visbio_diffusers.grid import save_png
from visbio_diffusers.load import find_model, load_pipeline
from visbio_diffusers.pipelines.schedulers import cosine_timesteps


FLOOR_DRAWS = 5


@dataclass(frozen=True, kw_only=True)
class EvaluateSamplersConfig:
    """Measure samplers, numbers of steps and guidance of one model."""

    model: str = field(metadata={"help": "folder or Hub id of the pipeline"})
    dataset_name: str = field(metadata={"help": "real images with classes, splits train and test"})
    output: str = field(metadata={"help": "JSON file for the results; the plot goes beside it"})
    caption_bank: str = flag("", "bank of a set that has none of its own")
    samplers: list[str] = field(default_factory=lambda: list(SAMPLERS), metadata={"help": ", ".join(SAMPLERS)})
    steps: list[int] = field(default_factory=lambda: [4, 8, 12, 25, 50], metadata={"help": "denoising steps"})
    timestep_spacing: list[str] = field(
        default_factory=lambda: ["even"], metadata={"help": "even or cosine, which DDIM does not take"}
    )
    guidance_scale: list[float] = field(default_factory=lambda: [1.35], metadata={"help": "weights of the text"})
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "low and high share of the guided timesteps, pair by pair"},
    )
    guidance_rescale: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "shares, 0 to 1"})
    save_default: bool = flag(False, "let the model's folder draw so: fewest steps within 10 % of the best distance")
    num_images: int = flag(1024, "images of each combination, as many of every class")
    batch_size: int = flag(64, "images drawn at once")
    evaluators: str = flag("", "folder of judges, trained if empty; default: in runs/evaluators")
    evaluator_steps: int = flag(2000, "optimizer steps of a judge")
    dtype: str = flag("float32", "float32, float16 or bfloat16")
    compile: bool = flag(False, "compile the UNet, which pays on a GPU")
    seed: int = flag(0, "of the images")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to draw and to measure")

    def __post_init__(self) -> None:
        """Check what the types do not."""
        unknown = [name for name in self.samplers if name not in SAMPLERS]
        if unknown or not self.samplers:
            raise ValueError(f"samplers are {', '.join(SAMPLERS)}, got {', '.join(unknown) or 'none'}")
        if not self.timestep_spacing or not set(self.timestep_spacing) <= {"even", "cosine"}:
            raise ValueError(f"timestep_spacing is even or cosine, got {', '.join(self.timestep_spacing) or 'none'}")
        if len(self.guidance_interval) % 2 or not self.guidance_interval:
            raise ValueError("guidance_interval must be pairs of low and high")
        if min(*self.steps, self.num_images, self.batch_size) < 1 or self.num_images < 16:
            raise ValueError("steps and batch_size must be at least 1, num_images at least 16")

    def combinations(self) -> list[dict]:
        """Return the settings of each set of images."""
        intervals = list(zip(self.guidance_interval[::2], self.guidance_interval[1::2], strict=True))
        names = "sampler", "timestep_spacing", "num_inference_steps"
        names += "guidance_scale", "guidance_interval", "guidance_rescale"
        values = self.samplers, self.timestep_spacing, self.steps
        values += self.guidance_scale, intervals, self.guidance_rescale
        return [dict(zip(names, each, strict=True)) for each in itertools.product(*values)]


class Judged:
    """Real images, and the judges that hold drawn ones against them."""

    def __init__(self, config: EvaluateSamplersConfig, side: int):
        form = {"resolution": side, "caption_bank": config.caption_bank or None}
        real = [load_image_dataset(config.dataset_name, split, **form) for split in ("train", "test")]
        if real[0].bank is None:
            raise ValueError(f"{real[0].name} has no captions for its classes: name a --caption_bank")
        self.bank = load_bank(real[0].bank)
        self.labels = evaluation.balanced_labels(config.num_images, len(self.bank.class_names))
        self.train, self.test = map(evaluation.as_split, real)
        folder = config.evaluators or Path("runs/evaluators", images_hash(self.train)[:12])
        settings = {"num_classes": len(self.bank.class_names), "device": config.device}
        self.judges = evaluation.load_evaluators(
            folder, self.train, self.test, steps=config.evaluator_steps, **settings
        )
        self.weights = class_weights(self.test.labels, self.labels)

    def floors(self) -> dict[str, float]:
        """Return the distance of as many real training images, the mean of some draws, by judge."""
        draws = [match_classes(self.train.labels, self.labels, seed) for seed in range(FLOOR_DRAWS)]
        return {
            judge.name: sum(self._distance(judge, judge.train_features[rows]) for rows in draws) / FLOOR_DRAWS
            for judge in self.judges
        }

    def _distance(self, judge, found) -> float:
        return frechet_distance(*moments(found), *moments(judge.test_features, self.weights))

    def __call__(self, images) -> dict:
        """Return for each judge the distance `frechet`, `within_class_distance`, and of classifiers `fidelity`."""
        rows = match_classes(self.train.labels, self.labels, 0)
        result = {}
        for judge in self.judges:
            found = features(judge.model, images)
            real = judge.train_features[rows], self.train.labels[rows]
            spread = within_class_distance(found, self.labels, *real, self.bank.class_names, num_resamples=2)
            result[judge.name] = {"frechet": self._distance(judge, found)}
            result[judge.name]["within_class_distance"] = spread["ratio"]["value"]
            if judge.classifies:
                result[judge.name]["fidelity"] = float((predictions(judge.model, found) == self.labels).mean())
        return result


def main(config: EvaluateSamplersConfig) -> int:
    """Draw and measure every combination; write the results after each."""
    pipe, facts = load_pipeline(config.model, config.device, config.dtype)
    pipe.set_progress_bar_config(disable=True)
    if config.compile:
        pipe.unet.to(memory_format=torch.channels_last).compile()
    judged = Judged(config, pipe.unet.config.sample_size)
    prompts = [judged.bank.plain_caption(int(label)) for label in judged.labels]
    output = Path(config.output)
    left_out = "output", "device", "batch_size", "save_default"
    asked = {name: value for name, value in asdict(config).items() if name not in left_out}
    results = {**evaluation.environment(), "model_sha256": facts["model_sha256"], "asked": asked, "runs": []}
    if output.exists():
        found = json.loads(output.read_text())
        same = all(found.get(name) == json.loads(json.dumps(results[name])) for name in ("model_sha256", "asked"))
        results["runs"] = found["runs"] if same else []
    results["floor"] = judged.floors()
    for combination in config.combinations()[len(results["runs"]) :]:
        options = dict(combination)
        pipe.scheduler = make_sampler(options.pop("sampler"), pipe.scheduler)
        spacing = options.pop("timestep_spacing")
        pipe.register_to_config(timestep_spacing=None)
        if spacing == "cosine":
            steps, length = options["num_inference_steps"], pipe.scheduler.config.num_train_timesteps
            options["timesteps"] = cosine_timesteps(steps, length)
        started = time.perf_counter()
        drawn = evaluation.generate_images(pipe, prompts, config.seed, config.batch_size, **options)
        seconds = time.perf_counter() - started
        results["runs"].append({**combination, "seconds": seconds, "judges": judged(drawn.images)})
        evaluation.write_results(results, output)
        sys.stdout.write(json.dumps(results["runs"][-1]) + "\n")
        sys.stdout.flush()
    judge = judged.judges[0].name
    save_png(plot_curves(curves(results["runs"], judge), "steps", f"FD-{judge}"), output.with_suffix(".png"))
    if config.save_default:
        best = cheapest(results["runs"], judge)
        defaults = {name: best[name] for name in ("num_inference_steps", "guidance_scale")}
        defaults["timestep_spacing"] = "cosine" if best["timestep_spacing"] == "cosine" else None
        save_defaults(find_model(config.model)[0], make_sampler(best["sampler"], pipe.scheduler), **defaults)
    return 0


if __name__ == "__main__":
    run(main, parse(EvaluateSamplersConfig, {}))
