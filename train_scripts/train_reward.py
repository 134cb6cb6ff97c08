"""Learn a reward from preferred images: a Bradley-Terry head on a frozen dual encoder.

accelerate launch train_scripts/train_reward.py --preferences pairs.jsonl --output_dir runs/reward
The folder OUTPUT_DIR/reward serves as `--reward preference:OUTPUT_DIR/reward`. A tenth of the pairs is held out, and
tells its accuracy.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from visbio_diffusers.alignment.preference import PreferenceHead, bradley_terry_loss, save_head
from visbio_diffusers.config import TrainConfig, flag, parse, run
from visbio_diffusers.evaluation import environment, proportion_interval
from visbio_diffusers.preferences import load_preferences
from visbio_diffusers.rewards import ALIGNMENT_MODEL, load_alignment
from visbio_diffusers.training import fit, make_accelerator, make_lr_scheduler, make_optimizer


logger = logging.getLogger(__name__)

HELDOUT = 10  # every so manyth pair is held out


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """Learn a reward from preferred images."""

    preferences: str = flag("", "JSON lines: prompt, image_w (the better one), image_l, who, when")
    alignment_model: str = flag(ALIGNMENT_MODEL, "dual encoder below: folder, Hub id, or the one we ship")
    max_train_steps: int = flag(300, "optimizer steps to take in all, resumed ones included")
    learning_rate: float = flag(1e-3, "highest learning rate of AdamW")
    use_ema: bool = flag(False, "not used here")

    def __post_init__(self) -> None:
        """Check the settings of this script too."""
        super().__post_init__()
        if self.push_to_hub or self.gradient_checkpointing or self.compile:
            raise ValueError("push_to_hub, gradient_checkpointing and compile are not supported here: leave them out")
        if not self.preferences:
            raise ValueError("nothing to train on: give --preferences, a file of JSON lines")


PRESETS = {"tiny": dict(max_train_steps=4, train_batch_size=4, report_to="none")}


def main(config: RewardConfig) -> int:
    """Train, and write the head; return the number of the signal that interrupted it, or 0."""
    accelerator = make_accelerator(config)
    name = config.alignment_model
    encoder = load_alignment(name, "cpu")
    pairs = load_preferences(config.preferences, encoder.resolution)
    embeds = [encoder.embed_images(list(images)) for images in (pairs.better, pairs.worse)]
    embeds.append(encoder.embed_texts(pairs.prompts))
    order = np.random.default_rng(config.seed).permutation(len(pairs.prompts))
    heldout, train = order[::HELDOUT], order[np.arange(len(order)) % HELDOUT > 0]
    if not len(train):
        raise ValueError(f"{config.preferences} has {len(order)} pairs: too few to hold one out")
    head = PreferenceHead(embeds[0].shape[1])
    optimizer = make_optimizer(head.parameters(), config)
    model, prepared = accelerator.prepare(head, optimizer)

    def stream(start: int):
        while True:
            rng = np.random.default_rng([config.seed, start, accelerator.process_index])
            rows = torch.as_tensor(rng.choice(train, config.train_batch_size))
            yield tuple(each[rows] for each in embeds)
            start += 1

    def loss_fn(model, batch):
        better, worse, text = batch
        scores = model(better, text), model(worse, text)
        return bradley_terry_loss(*scores), {"accuracy": (scores[0] > scores[1]).float().mean()}

    result = fit(accelerator, model, prepared, make_lr_scheduler(optimizer, config), stream, loss_fn, config)
    if accelerator.is_main_process and not result.signum:
        head = head.cpu().eval()
        with torch.no_grad():
            scores = [head(each[heldout], embeds[2][heldout]) for each in embeds[:2]]
        accuracy = proportion_interval(int((scores[0] > scores[1]).sum()), len(heldout))
        record = {**environment(), "config": asdict(config), "heldout_accuracy": accuracy}
        folder = save_head(Path(config.output_dir, "reward"), head, name, encoder.sha256, record)
        logger.info(f"{folder}: right on {accuracy['value']:.3f} of {accuracy['n']} held-out pairs")
    accelerator.end_training()
    return result.signum


if __name__ == "__main__":
    run(main, parse(RewardConfig, PRESETS))
