"""Group norm and pixel shuffle that leave channels-last images channels-last when they are compiled.

PyTorch's own return rows of one channel on a GPU, so that each convolution copies its input back, twice in training.
"""

import torch
import torch.nn.functional as F
from torch import nn


def _is_kept(images):
    return torch.compiler.is_compiling() and images.is_contiguous(memory_format=torch.channels_last)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, affine; compiled for channels-last images it keeps their layout and dtype."""

    def forward(self, hidden_states):
        """Normalise (B, C, H, W); statistics are in float32."""
        if not _is_kept(hidden_states):
            return super().forward(hidden_states)
        grouped = hidden_states.permute(0, 2, 3, 1).unflatten(3, (self.num_groups, -1)).float()  # (B, H, W, G, C / G)
        variance, mean = torch.var_mean(grouped, dim=(1, 2, 4), correction=0, keepdim=True)
        normed = ((grouped - mean) * torch.rsqrt(variance + self.eps)).flatten(3)
        normed = torch.addcmul(self.bias.float(), normed, self.weight.float())
        return normed.to(hidden_states.dtype).permute(0, 3, 1, 2)


def pixel_shuffle(images, factor):
    """Turn (B, C * factor^2, H, W) into (B, C, factor * H, factor * W), as `torch.nn.functional.pixel_shuffle`."""
    if not _is_kept(images):
        return F.pixel_shuffle(images, factor)
    height, width = images.shape[-2:]
    parts = images.permute(0, 2, 3, 1).unflatten(3, (-1, factor, factor))  # (B, H, W, C, f, f)
    return (
        parts.permute(0, 1, 4, 2, 5, 3).reshape(len(images), factor * height, factor * width, -1).permute(0, 3, 1, 2)
    )
