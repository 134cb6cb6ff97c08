"""Reward fine-tuning in rounds: draw images, score them, train on them; and watch that the reward is not cheated."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from visbio_diffusers.checkpoints import append_log
from visbio_diffusers.files import whole_file
from visbio_diffusers.grid import contact_sheet, save_png
from visbio_diffusers.objectives import PromptTracker, group_advantages
from visbio_diffusers.prompts import Prompts, prompts_of_round
from visbio_diffusers.reward_tuning import RoundsConfig, base_model, matching_log_prob
from visbio_diffusers.rewards import Reward
from visbio_diffusers.rollouts import Policy, Rollout, Text, collect, decoder, encode_prompts
from visbio_diffusers.training import trainable
from visbio_diffusers.validation import averaged_weights


logger = logging.getLogger(__name__)

LOG_NAME = "rounds.jsonl"
KL_STEPS = 4  # steps of the validation images at which the divergence from the base is measured


class Rounds:
    """Draws the images of each round for `fit`, keeps what is known of the rounds, and writes it to rounds.jsonl.

    Args:
        accelerator (`Accelerator`), config (`RoundsConfig`): of the training.
        pipe: with the UNet that is trained, on its device, with its adapter.
        policy (`Policy`): how images are drawn.
        reward (`Reward`): what is raised.
        heldout_reward (`Reward`, *optional*): what is watched.
        prompts (`Prompts`): for training and for watching.
        ema (`EMAModel`, *optional*): whose weights are watched.

    Raises:
        ValueError: if a round does not fill an optimizer step, the prompts cannot be shared out to the processes, or
            the reward has no gradients, which objective draft needs.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: RoundsConfig,
        pipe,
        policy: Policy,
        reward: Reward,
        heldout_reward: Reward | None,
        prompts: Prompts,
        ema=None,
    ):
        self.accelerator, self.config, self.pipe, self.policy = accelerator, config, pipe, policy
        self.reward, self.heldout_reward, self.prompts, self.ema = reward, heldout_reward, prompts, ema
        self.unet, self.decode = pipe.unet, decoder(pipe)
        self.tracker = PromptTracker() if config.baseline == "tracker" else None
        self.rows: list[dict[str, Any]] = []  # of all rounds
        self.watched: list[dict[str, float]] = []  # of all validations
        self.best: dict[str, torch.Tensor] = {}  # the adapter at the best of them
        self._base_images: torch.Tensor | None = None
        self._sums: dict[str, Any] = {}
        self.stopped = False
        if config.num_prompts_per_round % accelerator.num_processes:
            raise ValueError(
                f"num_prompts_per_round={config.num_prompts_per_round} must be a multiple of the "
                f"{accelerator.num_processes} processes"
            )
        if config.objective == "draft" and not reward.differentiable:
            raise ValueError(f"objective draft needs a reward with gradients; {reward.name} has none")
        self.images = config.num_prompts_per_round // accelerator.num_processes * config.num_images_per_prompt
        self.items = self.images * (1 if config.objective == "draft" else self._kept_steps())
        taken = config.train_batch_size * config.gradient_accumulation_steps
        self.round_steps = self.items // taken * config.num_inner_epochs
        if not self.round_steps:
            raise ValueError(
                f"a round has {self.items} samples for each process, and an optimizer step takes {taken}: lower "
                "--train_batch_size or --gradient_accumulation_steps, or draw more images"
            )
        if config.objective == "score_function" and self.round_steps > 1:
            raise ValueError(
                f"objective score_function is right on policy alone, so that a round has one optimizer step, not "
                f"{self.round_steps}: raise --gradient_accumulation_steps to {self.items // config.train_batch_size}"
            )
        if heldout_reward and (heldout_reward.name == reward.name or set(heldout_reward.sha256) & set(reward.sha256)):
            raise ValueError(f"heldout_reward {heldout_reward.name} is by the model of the reward: name another's")

    def _kept_steps(self) -> int:
        return max(1, round(len(self.policy.stochastic) * self.config.train_timestep_fraction))

    # what `fit` and checkpoints call

    def stream(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield the micro-batches of all rounds from that one on which begins with micro-batch `start`."""
        each = self.round_steps * self.config.gradient_accumulation_steps
        number, within = divmod(start, each)
        if within or len(self.rows) != number:
            raise ValueError(f"the checkpoint is from the middle of a round of {each} batches: resume its settings")
        if self.accelerator.is_main_process:  # without rounds that came after the checkpoint
            with whole_file(Path(self.config.output_dir, LOG_NAME)) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        while True:
            self.unet.eval()  # dropout would make another policy of it
            every = self.config.validation_rounds
            if number == 0 or (every and number % every == 0):
                self.validate(number)
            self.stopped = self._ended()
            if self.stopped:
                return
            yield from self._round(number)
            number += 1

    def hook(self, step: int, metrics: dict[str, Any]) -> None:
        """Collect the metrics of a round, and write its line when it is over."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value
        if step % self.round_steps:
            return
        names = sorted(set(self._sums) - {"lr"})
        sums = torch.stack(
            [torch.as_tensor(self._sums[name], device=self.accelerator.device).float() for name in names]
        )
        means = (self.accelerator.reduce(sums, "mean") / self.round_steps).tolist()
        row = {"step": step, **self.rows[-1], **dict(zip(names, means))}
        row["seconds"] = time.perf_counter() - self._began
        self.rows[-1], self._sums = row, {}
        if self.accelerator.is_main_process:
            append_log(Path(self.config.output_dir, LOG_NAME), [json.dumps(row) + "\n"])
        self.accelerator.log({k: v for k, v in row.items() if k not in ("step", "round")}, step=step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        state = {"rows": self.rows, "watched": self.watched, "best": self.best}
        return state | ({"tracker": self.tracker.state_dict()} if self.tracker else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rows, self.watched, self.best = list(state["rows"]), list(state["watched"]), dict(state["best"])
        if self.tracker and "tracker" in state:
            self.tracker.load_state_dict(state["tracker"])

    # one round

    def _round(self, number: int) -> Iterator[dict[str, Any]]:
        self._began = time.perf_counter()
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        prompts = prompts_of_round(self.prompts.train, config.num_prompts_per_round, number, config.seed)
        own = [prompt for prompt in prompts[rank::world] for _ in range(config.num_images_per_prompt)]
        entropy = np.random.SeedSequence([config.seed, number, rank, 1]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        repeated = torch.arange(len(own)) // config.num_images_per_prompt
        text = encode_prompts(self.pipe, prompts[rank::world]).rows(repeated)
        draft = config.objective == "draft"
        kept = self._chosen_steps(number) if config.objective in ("clipped_ratio", "score_function") else ()
        with self.accelerator.autocast():
            rollout = collect(
                self.unet, self.policy, text, generator, kept, config.draft_steps if draft else 0,
                config.rollout_batch_size,
            )  # fmt: skip
        row: dict[str, Any] = {"round": number, "queries": self.images * world}
        if draft:
            items = {"sample": rollout.samples}
        else:
            advantages = self._advantages(rollout, own, prompts, row)
            if config.objective == "matching":
                items = self._noised(rollout, text, generator, advantages)
            else:
                items = _steps(rollout, advantages)
        if self.watched and self.watched[-1]["round"] == number:
            row |= {name: value for name, value in self.watched[-1].items() if name != "round"}
        self.rows.append(row)
        yield from self._batches(items, text, own, generator)

    def _chosen_steps(self, number: int) -> list[int]:
        """Return the timesteps that are trained on in a round, the same for all its images."""
        rng = np.random.default_rng([self.config.seed, number, 2])
        return rng.choice(self.policy.stochastic.tolist(), self._kept_steps(), replace=False).tolist()

    def _advantages(self, rollout: Rollout, own: list[str], prompts: list[str], row: dict) -> torch.Tensor:
        """Score the images, note how the reward stands, and return the advantage of each, `(n,)`."""
        rewards = self.reward.score(self._images(rollout.samples), own).to(rollout.samples.device)
        world = self.accelerator.num_processes
        everything = self.accelerator.gather(rewards).cpu()
        names = [prompt for rank in range(world) for prompt in prompts[rank::world]]
        names = [prompt for prompt in names for _ in range(self.config.num_images_per_prompt)]
        groups = torch.arange(len(everything)) // self.config.num_images_per_prompt
        spread = everything.double().view(-1, self.config.num_images_per_prompt).std(dim=1)
        row |= {"reward": everything.mean().item(), "reward_std": everything.std().item()}
        row["zero_spread"] = (spread < 1e-6).float().mean().item()
        if row["zero_spread"] == 1:
            logger.warning(
                f"round {row['round']}: the reward {self.reward.name} is the same for all images of a prompt"
            )
        if self.tracker:
            found = self.tracker.advantages(names, everything)
        else:
            found = group_advantages(everything, groups, self.config.baseline)
        first = self.accelerator.process_index * len(rewards)
        return found[first : first + len(rewards)].to(rewards.device)

    @torch.no_grad()
    def _images(self, samples: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.decode(each) for each in samples.split(self.config.rollout_batch_size)]).clamp(-1, 1)

    @torch.no_grad()
    def _noised(self, rollout: Rollout, text: Text, generator: torch.Generator, advantages: torch.Tensor):
        """Return images with noise and timesteps at which they are to be denoised, and how well they are now."""
        times, count = self._kept_steps(), len(rollout.samples)
        rows = torch.arange(count).repeat(times)
        total = self.policy.scheduler.config.num_train_timesteps
        timesteps = torch.randint(total, (len(rows),), generator=generator).to(rollout.samples.device)
        noise = torch.randn(len(rows), *rollout.samples.shape[1:], generator=generator).to(rollout.samples.device)
        items = {"sample": rollout.samples[rows], "noise": noise, "timesteps": timesteps}
        batches = torch.arange(len(rows)).split(self.config.rollout_batch_size)
        with self.accelerator.autocast():
            old = [
                matching_log_prob(self.unet, self.policy, _rows(items, part) | {"text": text.rows(rows[part])})
                for part in batches
            ]
        return items | {"row": rows, "old_log_prob": torch.cat(old), "advantages": advantages[rows]}

    def _batches(self, items: dict[str, torch.Tensor], text: Text, prompts: list[str], generator: torch.Generator):
        """Yield the micro-batches of a round: each inner epoch in an order of its own; a rest is left out."""
        size, count = self.config.train_batch_size, self.config.gradient_accumulation_steps
        rows_of = items.pop("row", torch.arange(self.images))
        per_epoch = self.items // (size * count) * count
        for _ in range(self.config.num_inner_epochs):
            order = torch.randperm(self.items, generator=generator)
            for picked in order.split(size)[:per_epoch]:
                rows = rows_of[picked]
                yield _rows(items, picked) | {
                    "text": text.rows(rows.to(text.states.device)),
                    "prompts": [prompts[k] for k in rows],
                }

    # watching

    @torch.no_grad()
    def validate(self, number: int) -> dict[str, float]:
        """Draw the held-out prompts, always from the same seeds, and note rewards, diversity and divergence."""
        prompts = (self.prompts.heldout or self.prompts.train)[: self.config.num_validation_prompts]
        own = [prompt for prompt in prompts for _ in range(4)]
        text = encode_prompts(self.pipe, prompts).rows(torch.arange(len(own)) // 4)
        kept = self.policy.stochastic[:: max(1, len(self.policy.stochastic) // KL_STEPS)].tolist()
        was_training = self.unet.training
        self.unet.eval()

        def draw(steps=()) -> Rollout:
            with self.accelerator.autocast():
                generator = torch.Generator().manual_seed(self.config.seed)
                return collect(self.unet, self.policy, text, generator, steps, 0, self.config.rollout_batch_size)

        if self._base_images is None:
            with base_model(self.unet):
                self._base_images = self._images(draw().samples)
        with averaged_weights(self.unet, self.ema):
            rollout = draw(kept)
            divergence = self._divergence(rollout, text)
        images, base = self._images(rollout.samples), self._base_images
        found = {"round": number, "heldout_prompts_reward": self.reward.score(images, own).mean().item()}
        if self.heldout_reward:
            found["heldout_reward"] = self.heldout_reward.score(images, own).mean().item()
        found["kl_to_base"] = divergence
        found["diversity"] = _spread(images, 4) / max(_spread(base, 4), 1e-8)
        found = broadcast_object_list([found])[0]  # all processes end, or none
        self.watched = [each for each in self.watched if each["round"] < number] + [found]
        if self.heldout_reward and found is self._best():
            with averaged_weights(self.unet, self.ema):
                self.best = {str(k): each.detach().clone() for k, each in enumerate(trainable(self.unet))}
        if self.accelerator.is_main_process:
            pictures = [picture for pair in zip(self._pictures(base), self._pictures(images)) for picture in pair]
            titles = [title for prompt in own for title in (f"{prompt} (base)", prompt)]
            sheet = contact_sheet(pictures, titles, columns=8)
            save_png(sheet, Path(self.config.output_dir, "validation", f"round-{number:04d}.png"))
        self.unet.train(was_training)
        return found

    def _pictures(self, images: torch.Tensor) -> list:
        return self.pipe.image_processor.postprocess(images.cpu(), "pil")

    def _divergence(self, rollout: Rollout, text: Text) -> float:
        """Return the divergence of whole trajectories from those of the base, in nats, from those steps kept."""
        if not len(rollout.timesteps):
            return 0.0
        found = []
        for timestep, sample in zip(rollout.timesteps.tolist(), rollout.before):
            for rows in torch.arange(len(sample)).split(self.config.rollout_batch_size):
                steps = torch.full((len(rows),), timestep, device=sample.device)
                own = self.policy.step(self.unet, sample[rows], steps, text.rows(rows))
                with base_model(self.unet):
                    base = self.policy.step(self.unet, sample[rows], steps, text.rows(rows))
                found.append(own.kl(base))
        return torch.cat(found).mean().item() * len(self.policy.stochastic)

    def _best(self) -> dict[str, float]:
        """Return the last of the validations with the highest held-out reward."""
        return max(reversed(self.watched), key=lambda each: each.get("heldout_reward", -math.inf))

    def _ended(self) -> bool:
        """Whether the held-out reward stayed below its best `patience` times, and the reward above it there."""
        if not self.heldout_reward or not self.config.patience or len(self.watched) <= self.config.patience:
            return False
        best = self._best()
        later = self.watched[self.watched.index(best) + 1 :]
        risen = all(each["heldout_prompts_reward"] > best["heldout_prompts_reward"] for each in later)
        if len(later) < self.config.patience or not risen:
            return False
        logger.warning(
            f"the reward rises and the held-out one falls since round {best['round']:.0f}: the training ends, and "
            "the adapter of that round is kept"
        )
        return True

    def finish(self) -> None:
        """Draw the held-out prompts once more and log them; or, if it ended early, go back to the best adapter."""
        if self.stopped:
            for parameter, value in zip(trainable(self.unet), self.best.values()):
                parameter.data.copy_(value)
            return
        row = self.validate(len(self.rows))
        if self.accelerator.is_main_process:
            file = Path(self.config.output_dir, LOG_NAME)
            append_log(file, [json.dumps({"step": len(self.rows) * self.round_steps, **row}) + "\n"])


def _rows(items: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: values[rows.to(values.device)] for name, values in items.items()}


def _steps(rollout: Rollout, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each step of each image as one sample to train on."""
    count, times = len(rollout.samples), len(rollout.timesteps)
    return {
        "row": torch.arange(count).repeat(times),
        "sample": rollout.before.flatten(0, 1),
        "after": rollout.after.flatten(0, 1),
        "timesteps": rollout.timesteps.to(advantages.device).repeat_interleave(count),
        "old_log_prob": rollout.log_probs.flatten(),
        "advantages": advantages.repeat(times),
    }


def _spread(images: torch.Tensor, size: int) -> float:
    """Return the mean distance of images from others of the same prompt, as root mean square, in [0, 2]."""
    groups = images.float().flatten(1).unflatten(0, (-1, size))
    distances = torch.cdist(groups, groups).sum(dim=(1, 2)) / (size * (size - 1))
    return (distances / groups.shape[2] ** 0.5).mean().item()
