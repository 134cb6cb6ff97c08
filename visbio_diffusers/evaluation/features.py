"""A small classifier, trained by us on real images, whose answers and features the evaluation measures with."""

from __future__ import annotations

import hashlib
import json
import math
import os
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
