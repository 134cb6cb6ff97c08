"""How much does an adapter raise a reward on held-out prompts? Images with and without it, from the same seeds.

python train_scripts/evaluate_reward.py --loras dpo=runs/dpo/lora --rewards nucleus_area --output runs/gain.json
For a judge that is no reward, see evaluate_reward_tuning.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from visbio_diffusers import evaluation
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.evaluation.sampling import drawn_by, stored_images
from visbio_diffusers.evaluation.tuning import gain
from visbio_diffusers.grid import contact_sheet, save_png
from visbio_diffusers.load import load_pipeline
from visbio_diffusers.prompts import load_prompts
from visbio_diffusers.rewards import find_reward, score_images


@dataclass(frozen=True, kw_only=True)
class EvaluateRewardConfig:
    """Measure how much adapters raise rewards on held-out prompts."""

    loras: list[str] = field(metadata={"help": "adapters, as name=folder"})
    rewards: list[str] = field(metadata={"help": "what is measured, as --reward in train_ddpo_lora.py"})
    output: str = field(metadata={"help": "JSON file for the results; a picture goes beside it"})
    prompts: str = flag("bloodmnist", "caption bank, whose held-out prompts are drawn")
    num_prompts: int = flag(0, "held-out prompts to draw; 0 is all")
    num_images_per_prompt: int = flag(6, "images of each prompt")
    model: str = flag("", "pipeline that the adapters are for; default is the one that we ship")
    num_processes: int = flag(2, "processes that draw")
    seed: int = flag(1000, "of the images")


def draw(config: EvaluateRewardConfig, lora: str | None, prompts: list[str]) -> np.ndarray:
    """Return the images of prompts, with an adapter or without; what was drawn before is not drawn again."""
    settings = (config.model or None, None, "float32", lora, 1.0)
    request = drawn_by(*load_pipeline(*settings)), prompts, config.seed
    store = Path(config.output).with_suffix("") / evaluation.store_name(*request)
    return stored_images(settings, prompts, config.seed, 32, store, config.num_processes)


def main(config: EvaluateRewardConfig) -> int:
    """Draw, score, and write results and picture."""
    named = dict(each.split("=", 1) for each in config.loras if "=" in each)
    if len(named) != len(config.loras):
        raise ValueError(f"loras are given as name=folder, each under another name: {' '.join(config.loras)}")
    rewards = {spec: find_reward(spec) for spec in config.rewards}
    heldout = load_prompts(config.prompts).heldout
    heldout = heldout[: config.num_prompts or len(heldout)]
    if not heldout:
        raise ValueError(f"{config.prompts} has no held-out prompts: give a caption bank")
    prompts = [text for text in heldout for _ in range(config.num_images_per_prompt)]
    images = {name: draw(config, folder, prompts) for name, folder in {"base": None, **named}.items()}
    results = {**evaluation.environment(), "prompts": len(heldout), "rewards": {}}
    for spec, reward in rewards.items():
        scores = {name: score_images(reward, each, prompts) for name, each in images.items()}
        middle = np.median(scores["base"])
        entry = {"base": {"mean": float(scores["base"].mean()), "median": float(middle)}}
        for name in named:
            above, before = ((scores[each] > middle).astype(float) for each in (name, "base"))
            entry[name] = {
                "gain": gain([scores[name]], scores["base"], config.num_images_per_prompt),
                "more_above_median": gain([above], before, config.num_images_per_prompt),
                "above_median": float(above.mean()),
            }
            size, share = entry[name]["gain"], entry[name]["more_above_median"]
            sys.stdout.write(
                f"{spec}, {name}: {entry['base']['mean']:.4f} -> {scores[name].mean():.4f}, gain {size['value']:+.4f} "
                f"+- {size['standard_error']:.4f}; above the base's median {above.mean():.3f} "
                f"({share['value']:+.3f} +- {share['standard_error']:.3f})\n"
            )
        results["rewards"][spec] = entry
    evaluation.write_results(results, config.output)
    rows = np.linspace(0, len(prompts) - 1, 12).round().astype(int)
    tiles = [Image.fromarray(each[row].squeeze()) for each in images.values() for row in rows]
    titles = [f"{name}: {prompts[row]}" for name in images for row in rows]
    save_png(contact_sheet(tiles, titles, columns=12, tile=112), Path(config.output).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    run(main, parse(EvaluateRewardConfig, {}))
