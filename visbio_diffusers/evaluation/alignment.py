"""Does an image show what its prompt says? A small CLIP that the evaluation trains for itself, and its scores.

It is a judge only, never a reward. Its text features are those of the text encoder that comes with the package, the
same for every model that is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from visbio_diffusers.captions import load_bank
from visbio_diffusers.data import ImageDataset, caption_pools
from visbio_diffusers.evaluation import features as networks
from visbio_diffusers.evaluation.features import ImageTextEncoder, to_pixel_values
from visbio_diffusers.evaluation.judges import augment, minimise
from visbio_diffusers.evaluation.metrics import Z_95, proportion_interval
from visbio_diffusers.files import digest
from visbio_diffusers.load import default_model, load_pipeline
from visbio_diffusers.text import encode_text, text_mask


CAPTIONS_PER_CLASS = 256
CAPTIONS_PER_IMAGE = 16

TextFeatures = Callable[[Sequence[str]], np.ndarray]


def text_features(device: str = "cpu", batch_size: int = 256) -> TextFeatures:
    """Return a function from texts to the mean hidden states `(n, width)`, float32, of the shipped text encoder."""
    pipe, _ = load_pipeline(None, device)

    def encode(texts: Sequence[str]) -> np.ndarray:
        distinct = list(dict.fromkeys(texts))
        rows = []
        for start in tqdm(range(0, len(distinct), batch_size), desc="encoding captions", disable=len(distinct) < 1000):
            states = encode_text(pipe.text_encoder, pipe.tokenizer, distinct[start : start + batch_size])
            rows.append(states.sum(dim=1) / text_mask(states).sum(dim=1, keepdim=True))
        place = {text: row for row, text in enumerate(distinct)}
        return torch.cat(rows).float().cpu().numpy()[[place[text] for text in texts]]

    return encode


def text_encoder_hash() -> str:
    """Return the SHA-256 of the weights file of the shipped text encoder."""
    return digest(default_model() / "text_encoder" / "model.safetensors")


def plain_captions(dataset: ImageDataset) -> list[str]:
    """Return the plainest caption of each class of a set with one class per image, or its most frequent one."""
    if dataset.bank is not None:
        bank = load_bank(dataset.bank)
        return [bank.plain_caption(label) for label in range(len(bank.class_names))]
    if dataset.captions is not None:
        own = (Counter(np.array(dataset.captions)[dataset.labels == k]) for k in range(len(dataset.class_names)))
        return [str(counted.most_common(1)[0][0]) if counted else "" for counted in own]
    return [f"a microscopy image of {name}" for name in dataset.class_names]


def train_alignment(
    dataset: ImageDataset,
    images: np.ndarray,
    encode: TextFeatures,
    *,
    steps: int,
    seed: int,
    width: int = 64,
    kernel_size: int = 3,
    batch_size: int = 256,
    flip: bool = True,
    device: str = "cpu",
    description: str = "alignment",
) -> ImageTextEncoder:
    """Train an `ImageTextEncoder`: an image must find its caption among those of a batch, and the other way round.

    Args:
        dataset (`ImageDataset`): gives the captions, never those that are held out.
        images (`np.ndarray` of shape `(n, height, width, channels)`): its decoded images, uint8.
        encode: see [`text_features`].
        steps, seed, width, kernel_size, batch_size, flip, device, description: see `train_classifier`.

    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision.
    """
    rng = np.random.default_rng(seed)
    caption_of, captions = caption_pools([dataset], CAPTIONS_PER_CLASS, seed)
    place = {caption: row for row, caption in enumerate(captions)}
    items = [{"label": None, "subtype": None, "caption": None} | dataset[i] for i in range(len(dataset))]
    choices = np.array([[place[caption_of(0, item, rng)] for _ in range(CAPTIONS_PER_IMAGE)] for item in items])
    texts = torch.as_tensor(encode(captions))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageTextEncoder(texts.shape[1], images.shape[3], width, kernel_size)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pixel_values = augment(to_pixel_values(images[rows.numpy()], device), generator, flip)
        drawn = torch.randint(0, CAPTIONS_PER_IMAGE, (len(rows),), generator=generator)
        wanted = texts[choices[rows.numpy(), drawn.numpy()]].to(device)
        logits = model.project_images(model.features(pixel_values)) @ model.project_texts(wanted).T
        logits = logits * model.logit_scale.clamp(max=np.log(100.0)).exp()
        own = torch.arange(len(rows), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    minimise(model.to(device), loss_of, len(images), steps, batch_size, generator, description)
    return model


@torch.no_grad()
def alignment_scores(
    model: ImageTextEncoder,
    images: np.ndarray,
    labels: np.ndarray,
    prompts: Sequence[str],
    class_captions: Sequence[str],
    encode: TextFeatures,
) -> dict:
    """Measure how well images fit their prompts.

    Args:
        images (`np.ndarray` of shape `(n, height, width, channels)`), labels (`(n,)`): uint8 and class indices.
        prompts (`Sequence[str]`): one per image.
        class_captions (`Sequence[str]`): the plain caption of every class.

    Returns:
        `score`, 100 times the mean cosine of an image and its prompt; `mismatched`, the same with the captions of
        the other classes; `retrieval`, the share of images nearer to their prompt than to the caption of any other
        class. Each with a 95 % interval.

    Source: Hessel et al. 2021, CLIPScore (without its clipping at 0 and its factor of 2.5).
    """
    device = next(model.parameters()).device

    def projected(texts: Sequence[str]) -> torch.Tensor:
        return model.project_texts(torch.as_tensor(encode(texts), device=device))

    rows = model.project_images(torch.as_tensor(networks.features(model, images), device=device))
    own = (rows * projected(prompts)).sum(dim=1).cpu().numpy()
    others = (rows @ projected(class_captions).T).cpu().numpy()  # (n, classes)
    other = np.arange(len(class_captions))[None] != labels[:, None]
    nearest_other = np.where(other, others, -np.inf).max(axis=1)
    return {
        "score": _mean(100 * own),
        "mismatched": _mean(100 * (others * other).sum(axis=1) / other.sum(axis=1)),
        "retrieval": proportion_interval(int((own > nearest_other).sum()), len(own)),
    }


def _mean(values: np.ndarray) -> dict:
    """Return a mean with the interval of the normal distribution."""
    mean, half = float(values.mean()), Z_95 * float(values.std(ddof=1)) / np.sqrt(len(values))
    return {"value": mean, "low": float(mean - half), "high": float(mean + half), "n": len(values)}
