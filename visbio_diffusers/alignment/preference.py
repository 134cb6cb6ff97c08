"""A reward learned from preferred images: a Bradley-Terry head on a frozen dual encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from visbio_diffusers.checkpoints import save_folder
from visbio_diffusers.files import digest, one_line


WEIGHTS, CONFIG = "preference_head.safetensors", "preference.json"
WIDTH = 64


class PreferenceHead(nn.Module):
    """Scores an image and its prompt; the difference of two scores is the log-odds that the first is preferred.

    Args:
        dim (`int`): width of the joint embeds of images and texts.

    Source: Bradley and Terry 1952, Rank Analysis of Incomplete Block Designs; Xu et al. 2023, ImageReward, section 3.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * dim, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def forward(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Map rows of length 1, `(n, dim)` each, to scores `(n,)`."""
        scale = image_embeds.shape[1] ** 0.5
        return self.layers(torch.cat([scale * image_embeds, scale * image_embeds * text_embeds], dim=1))[:, 0]


def bradley_terry_loss(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Return minus the mean log-probability of preferences, of scores `(n,)` each: log 2 where nothing is known."""
    return -F.logsigmoid(better - worse).mean()


class Loaded(NamedTuple):
    """A head, the dual encoder that it stands on, and the digest of its weights."""

    head: PreferenceHead
    encoder: str
    encoder_sha256: str
    sha256: str


def save_head(folder: str | Path, head: PreferenceHead, encoder: str, encoder_sha256: str, record: dict) -> Path:
    """Write a head, whole or not at all; `record` (JSON values) tells how it was trained."""
    content = {"encoder": encoder, "encoder_sha256": encoder_sha256, "dim": head.layers[0].in_features // 2, **record}

    def write(path: Path) -> None:
        save_file({name: value.contiguous() for name, value in head.state_dict().items()}, path / WEIGHTS)
        (path / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    return save_folder(folder, write)


def load_head(folder: str | Path) -> Loaded:
    """Load what `save_head` wrote.

    Raises:
        ValueError: if it is no such folder, or damaged.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        head = PreferenceHead(content["dim"])
        head.load_state_dict(load_file(folder / WEIGHTS))
        sha256 = digest(folder / WEIGHTS)
        return Loaded(head.eval(), content["encoder"], content["encoder_sha256"], sha256)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the preference reward {folder} ({one_line(error)})") from error
