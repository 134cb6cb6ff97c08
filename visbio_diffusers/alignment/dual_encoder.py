"""A trained dual encoder of images and texts: `transformers.VisionTextDualEncoderModel`, processor and calibration.

Such a folder or Hub repo loads with transformers alone; `calibration.json` beside it is our own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, VisionTextDualEncoderModel

from visbio_diffusers.data import fit_image
from visbio_diffusers.files import digest, one_line
from visbio_diffusers.load import check_device, download_files, main_weights, quiet_loading, recorded_facts


CALIBRATION, FAMILIAR = "calibration.json", "familiar.safetensors"
UNKNOWN_SHARE = 0.01  # of validation images that a limit takes for something unknown


class Calibration(NamedTuple):
    """How cosines become probabilities, fitted on validation images.

    Args:
        scale (`float`): factor of the cosines before the softmax, the inverse of the temperature.
        threshold (`float`): highest cosine of an image below which none of the captions fits it.
    """

    scale: float
    threshold: float


class Familiar(NamedTuple):
    """What training images look like, by which images of other things are known.

    Args:
        means (`torch.Tensor` of shape `(classes, width)`): of the features of each class.
        precision (`torch.Tensor` of shape `(width, width)`): inverse of their covariance within classes.
        limit (`float`): distance beyond which an image is of something else.

    Source: Lee et al. 2018, A Simple Unified Framework for Detecting Out-of-Distribution Samples, section 2.1.
    """

    means: torch.Tensor
    precision: torch.Tensor
    limit: float

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        """Return the squared Mahalanobis distance of features `(n, width)` to the nearest class, `(n,)`."""
        apart = features[:, None] - self.means
        return torch.einsum("nkd,de,nke->nk", apart, self.precision, apart).min(dim=1).values


def familiarise(features: torch.Tensor, labels: torch.Tensor, validation: torch.Tensor) -> Familiar:
    """Fit [`Familiar`] to the features `(n, width)` of training images with classes `(n,)`, its limit to others."""
    means = torch.stack([features[labels == k].mean(dim=0) for k in labels.unique()])
    apart = features - means[torch.searchsorted(labels.unique(), labels)]
    covariance = apart.T @ apart / len(apart)
    ridge = 1e-4 * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    found = Familiar(means, torch.linalg.inv(covariance + ridge), float("inf"))
    return found._replace(limit=torch.quantile(found.distances(validation), 1 - UNKNOWN_SHARE).item())


def calibrate(similarities: torch.Tensor, labels: torch.Tensor) -> Calibration:
    """Fit the calibration to validation images.

    Args:
        similarities (`torch.Tensor` of shape `(n, classes)`): cosine of each image and each class.
        labels (`torch.Tensor` of shape `(n,)`): right classes.

    Returns:
        the scale with the least cross-entropy, and the threshold that 0.01 of the images do not reach.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2.
    """
    log_scale = torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(similarities * log_scale.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    threshold = torch.quantile(similarities.max(dim=1).values, UNKNOWN_SHARE)
    return Calibration(log_scale.exp().item(), threshold.item())


class DualEncoder:
    """Embeds images and texts as rows of length 1, whose product is their cosine.

    Args:
        model (`transformers.VisionTextDualEncoderModel`): in evaluation mode.
        processor (`transformers.ProcessorMixin`): the model's own.
        calibration (`Calibration`, *optional*): the model's own scale, and no threshold, where it has none.
        familiar (`Familiar`, *optional*): how to know images of other things.
        name, sha256 (`str`): what it is, and the digest of its weights.
        caption_bank (`str`): the bank whose captions it knows, empty where it has learned others.
    """

    def __init__(
        self,
        model,
        processor,
        calibration: Calibration | None = None,
        familiar: Familiar | None = None,
        name: str = "",
        sha256: str = "",
        caption_bank: str = "",
    ):
        """Keep the parts."""
        self.model, self.processor, self.familiar = model, processor, familiar
        self.name, self.sha256, self.caption_bank = name, sha256, caption_bank
        self.calibration = calibration or Calibration(model.logit_scale.exp().item(), -1.0)

    @property
    def resolution(self) -> int:
        """Side of the images that it looks at, in pixels."""
        size = self.processor.image_processor.size
        return int(size.get("height") or size["shortest_edge"])

    @torch.no_grad()
    def features(self, images: Sequence[np.ndarray | Image.Image], batch_size: int = 256) -> torch.Tensor:
        """Return the pooled features `(n, hidden_size)` of 8-bit images of any sizes; a longer side is cropped."""
        rows = []
        for start in range(0, len(images), batch_size):
            fitted = [fit_image(image, self.resolution) for image in images[start : start + batch_size]]
            pixel_values = self.processor(images=fitted, return_tensors="pt")["pixel_values"]
            rows.append(self.model.vision_model(pixel_values=pixel_values.to(self.model.device)).pooler_output.cpu())
        return torch.cat(rows).float()

    @torch.no_grad()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Return the rows `(n, width)` of pooled features of images."""
        projection = self.model.visual_projection
        return F.normalize(projection(features.to(projection.weight)).float().cpu(), dim=1)

    def embed_images(self, images: Sequence[np.ndarray | Image.Image]) -> torch.Tensor:
        """Return the rows `(n, width)`, float32 on the CPU, of 8-bit images of any sizes; a longer side is cropped."""
        return self.project(self.features(images))

    def is_familiar(self, features: torch.Tensor) -> torch.Tensor:
        """Return whether images look like those of the training, bool `(n,)`; all do where nothing was fitted."""
        if self.familiar is None:
            return torch.ones(len(features), dtype=torch.bool)
        return self.familiar.distances(features) <= self.familiar.limit

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Return the rows `(n, width)`, float32 on the CPU, of texts, cut to what the encoder takes."""
        tokenizer, rows = self.processor.tokenizer, []
        longest = min(tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(
                list(texts[start : start + batch_size]), padding=True, truncation=True, max_length=longest,
                return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            features = self.model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
            rows.append(F.normalize(features.float(), dim=1).cpu())
        return torch.cat(rows)


def load_dual_encoder(name: str, device: str | None = None) -> DualEncoder:
    """Load a dual encoder.

    Args:
        name (`str`): a folder written by `save_pretrained`, or "owner/name" of a Hub repo.
        device (`str`, *optional*): "cpu", "mps", "cuda" or "cuda:1"; default is the fastest there is.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is incomplete or damaged, or there is no such device.
        OSError: if the Hub cannot be reached.
    """
    device = check_device(device)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = download_files(name, ["*.json", "*.txt", "*.safetensors"], "alignment model")
    try:
        weights = [file for file in main_weights(folder) if file.name != FAMILIAR]
        if not weights:
            raise OSError("it has no .safetensors weights, and others, which can run code, are not loaded")
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind != "vision-text-dual-encoder":
            raise ValueError(f"it is a {kind}, and no vision-text-dual-encoder")
        with quiet_loading():
            model = VisionTextDualEncoderModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            processor = AutoProcessor.from_pretrained(folder)
        if len(processor.tokenizer) <= len(processor.tokenizer.all_special_tokens):  # a lost vocabulary loads so
            raise ValueError("its tokenizer has no words")
        calibration, familiar = _fitted(folder)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load the alignment model {name} ({one_line(error)}): get a whole copy") from error
    label = folder.resolve().name if Path(name).expanduser().is_dir() else name
    bank = recorded_facts(folder).get("caption_banks", "").split(", ")[0]
    return DualEncoder(model.eval().to(device), processor, calibration, familiar, label, digest(*weights), bank)


def _fitted(folder: Path) -> tuple[Calibration | None, Familiar | None]:
    """Return what `write_calibration` has written, None for a file that is not there."""
    calibration = familiar = None
    if (folder / CALIBRATION).exists():
        fitted = json.loads((folder / CALIBRATION).read_text(encoding="utf-8"))
        calibration = Calibration(fitted["scale"], fitted["threshold"])
        if (folder / FAMILIAR).exists():
            familiar = Familiar(**load_file(folder / FAMILIAR), limit=fitted["limit"])
    return calibration, familiar


def write_calibration(folder: Path, encoder: DualEncoder, dataset: str, train, validation) -> None:
    """Fit calibration and familiarity of a dual encoder, and write them to its folder.

    Args:
        folder (`Path`): of the model.
        encoder (`DualEncoder`): as it will be saved.
        dataset (`str`): name of the set, for the record.
        train (`tuple[torch.Tensor, torch.Tensor]`): features and labels of training images.
        validation (`tuple[torch.Tensor, torch.Tensor, torch.Tensor]`): features and labels of validation images, and
            the embeds of the classes.
    """
    features, labels, classes = validation
    calibration = calibrate(encoder.project(features) @ classes.T, labels)
    familiar = familiarise(*train, features)
    record = {**calibration._asdict(), "limit": familiar.limit, "dataset": dataset, "n": len(labels)}
    (folder / CALIBRATION).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    tensors = {"means": familiar.means, "precision": familiar.precision.contiguous()}
    save_file(tensors, folder / FAMILIAR)
