"""The small networks whose features, and answers, the evaluation measures with: form, files, use."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from visbio_diffusers import checkpoints


WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
JOINT_WIDTH = 128


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation, added to their (pooled, projected) input."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        """Create the layers; `stride` 2 halves the resolution, rounded up."""
        super().__init__()
        padding = kernel_size // 2
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size, 1, padding, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(stride, ceil_mode=True)
        same = in_channels == out_channels
        self.project = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, in_channels, height, width)` to `(batch, out_channels, height / stride, width / stride)`."""
        residual = F.relu(self.norm1(self.conv1(hidden_states)))
        return F.relu(self.norm2(self.conv2(residual)) + self.project(self.pool(hidden_states)))


class ImageEncoder(nn.Module):
    """A residual network for small images of any size; its features are the pooled last feature map.

    Args:
        in_channels (`int`): 3 for RGB, 1 for grey.
        width (`int`): channels of the stem; the blocks have twice as many, the features too.
        kernel_size (`int`): odd side of all filters.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, kernel_size: int = 3):
        """Create the layers with random weights."""
        super().__init__()
        self.config = {"in_channels": in_channels, "width": width, "kernel_size": kernel_size}
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(width, 2 * width, kernel_size, stride=2), ResidualBlock(2 * width, 2 * width, kernel_size, 1)
        )

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, height, width)` in [-1, 1] to `(batch, 2 * width)`."""
        return self.blocks(self.stem(pixel_values)).mean(dim=(2, 3))

    forward = features


class ImageClassifier(ImageEncoder):
    """An `ImageEncoder` with one linear layer, trained on labelled images; `num_classes` is the number of answers."""

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64, kernel_size: int = 3):
        """Create the layers with random weights."""
        super().__init__(in_channels, width, kernel_size)
        self.config = {"num_classes": num_classes, **self.config}
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, height, width)` in [-1, 1] to logits `(batch, num_classes)`."""
        return self.head(self.features(pixel_values))


class ImageTextEncoder(ImageEncoder):
    """An `ImageEncoder` beside a projection of text features, into one space; `text_width` is that of the features."""

    def __init__(self, text_width: int, in_channels: int = 3, width: int = 64, kernel_size: int = 3):
        """Create the layers with random weights."""
        super().__init__(in_channels, width, kernel_size)
        self.config = {"text_width": text_width, **self.config}
        self.image_projection = nn.Linear(2 * width, JOINT_WIDTH, bias=False)
        self.text_projection = nn.Linear(text_width, JOINT_WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def project_images(self, image_features: torch.Tensor) -> torch.Tensor:
        """Map the features of images `(batch, 2 * width)` to rows of length 1."""
        return F.normalize(self.image_projection(image_features), dim=1)

    def project_texts(self, text_features: torch.Tensor) -> torch.Tensor:
        """Map the features of texts `(batch, text_width)` to rows of length 1."""
        return F.normalize(self.text_projection(text_features), dim=1)


def to_pixel_values(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Turn uint8 images `(n, height, width, channels)` into float `(n, channels, height, width)` in [-1, 1]."""
    pixel_values = torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixel_values.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def features(model: ImageEncoder, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Return the features of uint8 images `(n, height, width, channels)` as float32 `(n, d)`."""
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    batches = (to_pixel_values(images[i : i + batch_size], device) for i in range(0, len(images), batch_size))
    return np.concatenate([model.features(batch).float().cpu().numpy() for batch in batches])


@torch.no_grad()
def predictions(model: ImageClassifier, image_features: np.ndarray) -> np.ndarray:
    """Return the class indices `(n,)` that the classifier gives to images with these features `(n, d)`."""
    inputs = torch.as_tensor(image_features, device=next(model.parameters()).device)
    return model.head(inputs).argmax(dim=1).cpu().numpy()


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the weights, which says in a report what exactly was used."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(model: ImageEncoder, folder: str | Path, training: dict) -> None:
    """Write weights and config to `folder`; `training` (JSON values) tells how the network came about.

    Raises:
        OSError: if the folder cannot be written; nothing is left behind.
    """

    def write(path: Path) -> None:
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, path / WEIGHTS_NAME)
        content = {"model": model.config, "training": training}
        (path / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n")

    checkpoints.save_folder(folder, write)


def load(folder: str | Path, device: torch.device | str = "cpu") -> tuple[ImageEncoder, dict]:
    """Return the `ImageClassifier` or `ImageEncoder` that `save` wrote, in evaluation mode, and its `training`.

    Raises:
        FileNotFoundError: if the folder holds no such network.
        ValueError: if its files are damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no evaluator: it needs {CONFIG_NAME} and {WEIGHTS_NAME}")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        kinds = {"num_classes": ImageClassifier, "text_width": ImageTextEncoder}
        kind = next((kinds[name] for name in kinds if name in config["model"]), ImageEncoder)
        model = kind(**config["model"])
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        training = config["training"]
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the evaluator in {folder} is damaged: delete the folder and train it anew") from error
    return model.to(device, memory_format=torch.channels_last).eval(), training
