"""Classes told apart by their captions alone, without training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from visbio_diffusers.alignment.dual_encoder import DualEncoder
from visbio_diffusers.captions import CaptionBank


ENSEMBLE_SIZE = 64


def caption_ensembles(bank: CaptionBank, subtypes: bool = False, size: int = ENSEMBLE_SIZE) -> dict[str, list[str]]:
    """Return many wordings of each class of a bank, its plainest caption first.

    Args:
        bank (`CaptionBank`): of a set with one class per image.
        subtypes (`bool`): take the subtypes in the place of a class that has some.
        size (`int`): wordings of each.
    """
    found = {}
    for label, words in enumerate(bank.classes):
        for name in words.subtypes if subtypes and words.subtypes else [None]:
            plain = bank.plain_caption(label, name)
            drawn = bank.pool(label, size, seed=0, subtype=name or words.name, subtype_share=1.0)
            found[name or words.name] = [plain, *(text for text in drawn if text != plain)][:size]
    return found


def classify(encoder: DualEncoder, image_embeds: torch.Tensor, captions: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return the cosines of images and classes, `(n, classes)`.

    Args:
        encoder (`DualEncoder`): embeds the captions.
        image_embeds (`torch.Tensor` of shape `(n, width)`): of [`DualEncoder.embed_images`].
        captions (`Sequence[Sequence[str]]`): one or more wordings of each class.

    The cosines times `encoder.calibration.scale`, in a softmax, are probabilities; where the highest cosine is below
    `encoder.calibration.threshold`, the image shows none of the classes.

    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, section 3.1.4.
    """
    return image_embeds @ class_embeds(encoder, captions).T


def class_embeds(encoder: DualEncoder, captions: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return the mean direction of the wordings of each class, `(classes, width)`."""
    rows = encoder.embed_texts([text for each in captions for text in each])
    means = [F.normalize(each.mean(dim=0), dim=0) for each in rows.split([len(each) for each in captions])]
    return torch.stack(means)
