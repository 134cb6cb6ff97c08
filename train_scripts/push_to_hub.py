"""Publish a trained pipeline, LoRA adapter or text encoder on the Hub.

python train_scripts/push_to_hub.py --folder runs/my-model/pipeline --hub_model_id my-name/my-model
The repo is made, loaded in fresh processes, then uploaded; when that is interrupted, the same command goes on. With
--output_dir it is written there instead, and nothing is uploaded.
"""

import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from visbio_diffusers import hub
from visbio_diffusers.config import flag, parse, run


PARTS = ("pipeline", "lora", "alignment", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Publish a trained pipeline, LoRA adapter or text encoder on the Hub."""

    folder: str = field(
        metadata={"help": "what a training has written: RUN/pipeline, RUN/lora, RUN/alignment or RUN/text_encoder"}
    )
    hub_model_id: str = flag("", "repo to upload to, as owner/name, or a name in your own space")
    private: bool = flag(False, "make a new repo private")
    revision: str = flag("", "branch to push to, created if there is none")
    create_pr: bool = flag(False, "open a pull request instead of pushing")
    variant: str = flag("", "fp16 adds weights in half precision, for from_pretrained(variant='fp16')")
    max_shard_size: str = flag("", "split larger weights, such as 5GB")
    commit_message: str = flag("", "of the upload")
    output_dir: str = flag("", "write the repo to this folder, and upload nothing")

    def __post_init__(self) -> None:
        """Check what the types do not."""
        if self.variant not in ("", "fp16"):
            raise ValueError(f"variant must be fp16 or empty, got {self.variant!r}")
        if self.max_shard_size and not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", self.max_shard_size):
            raise ValueError(f"max_shard_size must be like 5GB or 500MB, got {self.max_shard_size!r}")
        if self.create_pr and self.revision:
            raise ValueError("create_pr opens its request against main: leave out revision")
        if bool(self.output_dir) == bool(self.hub_model_id):
            raise ValueError("give either hub_model_id, to upload the repo, or output_dir, to write it there")
        if self.output_dir and Path(self.output_dir).exists():
            raise ValueError(f"{self.output_dir} is there already: name a new --output_dir")


def main(config: PushConfig) -> int:
    """Publish, or write, and return 0."""
    source, repo_id = Path(config.folder), ""
    hub.check_source(source)
    if config.hub_model_id:
        repo_id = hub.open_repo(config.hub_model_id, config.private, config.create_pr)
    trained = source.resolve()
    own = trained.parent.name if trained.name in PARTS else trained.name  # RUN/pipeline is called RUN
    name = repo_id or own
    with hub.made_repo(source, name, config.variant or None, config.max_shard_size or None) as repo:
        if config.output_dir:
            place = shutil.copytree(repo, config.output_dir)
        else:
            place = hub.upload(repo, repo_id, config.revision or None, config.create_pr, config.commit_message or None)
    sys.stdout.write(f"{place}\n")
    return 0


if __name__ == "__main__":
    run(main, parse(PushConfig, {}))
