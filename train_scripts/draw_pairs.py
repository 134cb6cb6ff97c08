"""Draw pairs of images and let a reward say which one is better, in the form that votes of people have.

python train_scripts/draw_pairs.py --reward nucleus_area --num_pairs 200 --output_dir runs/pairs
OUTPUT_DIR/pairs.jsonl is read by train_reward.py and train_dpo_lora.py. With --reward preference:FOLDER, what was
learned from a few votes of people judges many pairs.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from visbio_diffusers import evaluation
from visbio_diffusers.config import flag, parse, run
from visbio_diffusers.evaluation.sampling import stored_images
from visbio_diffusers.grid import png_bytes
from visbio_diffusers.load import DEFAULT_MODEL
from visbio_diffusers.preferences import add_preference
from visbio_diffusers.prompts import load_prompts, prompts_of_round
from visbio_diffusers.rewards import find_reward, score_images


BATCH = 32


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Draw pairs of images and let a reward say which one is better."""

    output_dir: str = field(metadata={"help": "folder for pairs.jsonl and its images"})
    reward: str = flag("zero_shot", "what judges them, as in train_ddpo_lora.py")
    prompts: str = flag("bloodmnist", "caption bank, .txt of one prompt a line, or captioned set")
    num_pairs: int = flag(200, "pairs to judge, each of one prompt")
    temperature: float = flag(0.0, "of the choice, in units of the reward: 0 always takes the better image")
    model: str = flag("", "pipeline that draws; default is the one that we ship")
    num_processes: int = flag(2, "processes that draw")
    seed: int = flag(0, "of images, prompts and choices")

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.num_pairs < 1 or self.temperature < 0:
            raise ValueError(
                f"num_pairs must be at least 1 and temperature at least 0, got {self.num_pairs} and {self.temperature}"
            )


def choose(scores: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """Return for scores `(n, 2)` which is chosen, 0 or 1; with a temperature as Bradley and Terry's model has it."""
    lead = scores[:, 1] - scores[:, 0]
    return (lead + temperature * rng.logistic(size=len(lead)) > 0).astype(int)


def main(config: PairsConfig) -> int:
    """Draw, judge, and write; images of a run that was killed are not drawn again."""
    file = Path(config.output_dir, "pairs.jsonl")
    if file.exists():
        raise ValueError(f"{file} is there already: choose another --output_dir")
    reward = find_reward(config.reward)
    asked = prompts_of_round(load_prompts(config.prompts).train, config.num_pairs, 0, config.seed)
    prompts = [text for text in asked for _ in range(2)]
    request = config.model or DEFAULT_MODEL, prompts, config.seed
    store = Path(config.output_dir, "drawn", evaluation.store_name(*request))
    images = stored_images((config.model or None,), prompts, config.seed, BATCH, store, config.num_processes)
    scores = score_images(reward, images, prompts).reshape(-1, 2)
    chosen = choose(scores, config.temperature, np.random.default_rng(config.seed))
    for row, (prompt, better) in enumerate(zip(asked, chosen)):
        pair = []
        for place in (2 * row + better, 2 * row + 1 - better):
            record = {"synthetic": "true", "model": request[0], "prompt": prompt, "seed": str(config.seed + place)}
            pair.append(png_bytes(Image.fromarray(images[place].squeeze()), record))
        add_preference(file, prompt, *pair, who=reward.name)
    sys.stdout.write(f"{file}: {len(asked)} pairs\n")
    return 0


if __name__ == "__main__":
    run(main, parse(PairsConfig, {}))
