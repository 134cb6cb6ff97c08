"""What an image shows: captions ranked by a dual encoder, with probabilities, or none of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from visbio_diffusers.alignment.dual_encoder import DualEncoder
from visbio_diffusers.alignment.zero_shot import caption_ensembles, classify
from visbio_diffusers.captions import load_bank


class Description(NamedTuple):
    """What is said of one image.

    Args:
        ranking (`list[tuple[int, float]]`): number of a candidate and its probability, the likeliest first.
        cosine (`float`): of the image and the likeliest.
        doubt (`str`): why none of them fits; empty where one does.
    """

    ranking: list[tuple[int, float]]
    cosine: float
    doubt: str


def read_candidates(source: str, subtypes: bool = False) -> dict[str, list[str]]:
    """Return the captions to choose from: what is said of an image, and the wordings that stand for it.

    Args:
        source (`str`): name or YAML file of a caption bank; or a file of one caption a line, or CSV with a column
            "caption" or "text" and, where several wordings mean the same, a column "label".
        subtypes (`bool`): of a bank, take the subtypes in the place of a class that has some.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no captions, or the name is no bank's.
    """
    path = Path(source)
    if path.suffix.lower() not in (".txt", ".csv"):
        return {wordings[0]: wordings for wordings in caption_ensembles(load_bank(source), subtypes).values()}
    if not path.is_file():
        raise FileNotFoundError(f"no file {source}: check the path")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = path.suffix.lower() == ".txt"
            rows = [{"caption": line} for line in file] if lines else list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {source} ({error}): write it anew, in UTF-8") from error
    if rows and not {"caption", "text"} & set(rows[0]):
        raise ValueError(f"{source} has the columns {', '.join(map(str, rows[0]))}: it needs one named caption")
    found: dict[str, list[str]] = {}
    for row in rows:
        text = (row.get("caption") or row.get("text") or "").strip()
        if text:
            found.setdefault((row.get("label") or text).strip(), []).append(text)
    if not found:
        raise ValueError(f"{source} holds no captions: write one a line, or a CSV with a column caption")
    return found


def describe(encoder: DualEncoder, features: torch.Tensor, captions: Sequence[Sequence[str]]) -> list[Description]:
    """Rank captions for each image.

    Args:
        encoder (`DualEncoder`): embeds the captions; its calibration gives probabilities and limits.
        features (`torch.Tensor` of shape `(n, hidden_size)`): of the images, by its `features`.
        captions (`Sequence[Sequence[str]]`): the wordings of each candidate.
    """
    cosines = classify(encoder, encoder.project(features), captions)
    familiar = encoder.is_familiar(features)
    probabilities = (cosines * encoder.calibration.scale).softmax(dim=1)
    best, order = cosines.max(dim=1).values, probabilities.argsort(dim=1, descending=True)
    return [
        Description(
            ranking=[(int(k), float(probabilities[row, k])) for k in order[row]],
            cosine=float(best[row]),
            doubt=_doubt(float(best[row]), bool(familiar[row]), encoder.calibration.threshold),
        )
        for row in range(len(cosines))
    ]


def _doubt(cosine: float, familiar: bool, threshold: float) -> str:
    if not familiar:
        return "unlike all images that the model was trained on"
    return f"cosine {cosine:.2f}, below {threshold:.2f}" if cosine < threshold else ""
