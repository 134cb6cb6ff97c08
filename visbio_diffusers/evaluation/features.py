"""A small classifier, trained by us on real images, whose answers and features the evaluation measures with."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from visbio_diffusers import checkpoints


WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


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


class ImageClassifier(nn.Module):
    """A residual network for small images of any size; its features are the pooled last feature map.

    Args:
        num_classes (`int`): number of answers.
        in_channels (`int`): 3 for RGB, 1 for grey.
        width (`int`): channels of the stem; the blocks have twice as many, the features too.
        kernel_size (`int`): odd side of all filters.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64, kernel_size: int = 3):
        """Create the layers with random weights."""
        super().__init__()
        self.config = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "width": width,
            "kernel_size": kernel_size,
        }
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(width, 2 * width, kernel_size, stride=2), ResidualBlock(2 * width, 2 * width, kernel_size, 1)
        )
        self.head = nn.Linear(2 * width, num_classes)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, height, width)` in [-1, 1] to `(batch, 2 * width)`."""
        return self.blocks(self.stem(pixel_values)).mean(dim=(2, 3))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, height, width)` in [-1, 1] to logits `(batch, num_classes)`."""
        return self.head(self.features(pixel_values))


def augment(pixel_values: torch.Tensor, generator: torch.Generator, flip: bool = True) -> torch.Tensor:
    """Vary images as photographs of the same object vary: position, size, sharpness, light, and noise.

    A quarter of them, taken through rotation, resizing, blur or sharpening, teaches not to rely on sharpness, which
    generated and real images differ in. The others keep their pixels but for shifts, turns and light.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): in [-1, 1]; the result exceeds it.
        generator (`torch.Generator`): on the CPU; the only source of randomness.
        flip (`bool`): allow mirror images and quarter turns; not where left and right are classes.
    """
    n, channels, _, width = pixel_values.shape
    device = pixel_values.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    resampled = (uniform(0, 1, n) < 0.25).float()
    angle = resampled * uniform(-0.4, 0.4, n)
    scale = 1 + resampled * uniform(-0.12, 0.12, n)
    mirror = torch.ones(n)
    if flip:
        angle = angle + torch.randint(0, 4, (n,), generator=generator) * (math.pi / 2)
        mirror = torch.where(uniform(0, 1, n) < 0.5, -1.0, 1.0)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() * scale * mirror, -angle.sin() * scale
    affine[:, 1, 0], affine[:, 1, 1] = angle.sin() * scale * mirror, angle.cos() * scale
    affine[:, :, 2] = torch.randint(-2, 3, (n, 2), generator=generator) * 2 / width  # up to 2 pixels
    grid = F.affine_grid(affine.to(device), list(pixel_values.shape), align_corners=False)
    images = F.grid_sample(pixel_values, grid, padding_mode="reflection", align_corners=False)

    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (row[:, None] * row).expand(channels, 1, 3, 3).to(device)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), kernel, groups=channels)
    amount = resampled[:, None, None, None] * uniform(-0.3, 1.0, n, 1, 1, 1)  # below 0 sharpens
    images = images + amount.to(device) * (blurred - images)

    gain = uniform(0.98, 1.02, n, channels, 1, 1) * uniform(0.96, 1.04, n, 1, 1, 1)
    offset = uniform(-0.04, 0.04, n, 1, 1, 1)
    noise = uniform(0, 0.02, n, 1, 1, 1) * torch.randn(images.shape, generator=generator)
    return images * gain.to(device) + (offset + noise).to(device)


def to_pixel_values(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Turn uint8 images `(n, height, width, channels)` into float `(n, channels, height, width)` in [-1, 1]."""
    pixel_values = torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixel_values.contiguous(memory_format=torch.channels_last)


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    steps: int,
    seed: int,
    width: int = 64,
    kernel_size: int = 3,
    batch_size: int = 64,
    flip: bool = True,
    device: torch.device | str = "cpu",
    description: str = "classifier",
) -> ImageClassifier:
    """Train an `ImageClassifier` from nothing; equal arguments on one machine give equal weights.

    Args:
        images (`np.ndarray` of shape `(n, height, width, channels)`): uint8.
        labels (`np.ndarray` of shape `(n,)`): class indices.
        steps (`int`): optimizer steps of `batch_size` images (AdamW, one cycle of the learning rate up to 3e-3).
        flip (`bool`): see `augment`.
        description (`str`): shown beside the progress bar.

    Returns:
        the classifier in evaluation mode, on `device`.

    Raises:
        ValueError: if a label is outside `[0, num_classes)`, or labels are not one per image.
    """
    if labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be {len(images)} integers in 0 to {num_classes - 1}, one class an image")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageClassifier(num_classes, images.shape[3], width, kernel_size)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    targets = torch.as_tensor(labels, dtype=torch.int64)
    epochs = -(-steps * batch_size // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for rows in tqdm(order.split(batch_size)[:steps], desc=description):
        pixel_values = augment(to_pixel_values(images[rows.numpy()], device), generator, flip)
        loss = F.cross_entropy(model(pixel_values), targets[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
    return model.eval()


@torch.no_grad()
def features(model: ImageClassifier, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Return the features of uint8 images `(n, height, width, channels)` as float32 `(n, d)`."""
    device = next(model.parameters()).device
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


def save(model: ImageClassifier, folder: str | Path, training: dict) -> None:
    """Write weights and config to `folder`; `training` (JSON values) tells how the classifier came about.

    Raises:
        OSError: if the folder cannot be written; nothing is left behind.
    """

    def write(path: Path) -> None:
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, path / WEIGHTS_NAME)
        content = {"model": model.config, "training": training}
        (path / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n")

    checkpoints.save_folder(folder, write)


def load(folder: str | Path, device: torch.device | str = "cpu") -> tuple[ImageClassifier, dict]:
    """Return the classifier that `save` wrote, in evaluation mode, and its `training` information.

    Raises:
        FileNotFoundError: if the folder holds no classifier.
        ValueError: if its files are damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no classifier: it needs {CONFIG_NAME} and {WEIGHTS_NAME}")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        model = ImageClassifier(**config["model"])
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        return model.to(device, memory_format=torch.channels_last).eval(), config["training"]
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the classifier in {folder} is damaged: delete the folder and train it anew") from error
