"""Images as another microscope, another laboratory or another file would show them."""

import math

import torch
import torch.nn.functional as F


def vary_photographs(pixel_values: torch.Tensor) -> torch.Tensor:
    """Vary turn, zoom, sharpness, resolution, stain, light and noise, each in a random part of the images.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): in [-1, 1].

    Returns:
        `torch.Tensor` of the same shape, in [-1, 1]. All randomness is that of torch's generator of the device.
    """
    images = _some(pixel_values, 0.5, turn_and_zoom)
    images = _some(images, 0.4, lambda some: rescale(some, 0.45 + 0.55 * torch.rand(()).item()))
    images = _some(images, 0.4, lambda some: blur(some, torch.rand(len(some), device=some.device)))
    images = _some(images, 0.8, vary_stain)
    noise = torch.rand(len(images), 1, 1, 1, device=images.device) * 0.06
    return (images + noise * torch.randn_like(images)).clamp(-1, 1)


def _some(images, share, change):
    """Return the images with `change` done to a random share of them."""
    chosen = torch.rand(len(images), device=images.device) < share
    return images.index_put((chosen,), change(images[chosen])) if chosen.any() else images


def turn_and_zoom(images: torch.Tensor) -> torch.Tensor:
    """Turn images by any angle, zoom by a factor of 0.77 to 1.3, and shift by up to a tenth."""
    angle = torch.rand(len(images), device=images.device) * 2 * math.pi
    zoom = torch.exp((torch.rand_like(angle) * 2 - 1) * math.log(1.3))
    affine = images.new_zeros(len(images), 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = angle.cos() * zoom
    affine[:, 1, 0] = angle.sin() * zoom
    affine[:, 0, 1] = -affine[:, 1, 0]
    affine[:, :, 2] = (torch.rand(len(images), 2, device=images.device) * 2 - 1) * 0.2
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def rescale(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Show images as they are after they were stored at `factor` times their side and enlarged again."""
    side = [max(round(length * factor), 2) for length in images.shape[2:]]
    small = F.interpolate(images, side, mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[2:], mode="bicubic", antialias=True).clamp(-1, 1)


def blur(images: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Blend each image with its blurred self (Gaussian, standard deviation one pixel) by `amount` `(batch,)`."""
    channels = images.shape[1]
    row = torch.exp(-torch.arange(-2.0, 3.0, device=images.device).square() / 2)
    kernel = (row[:, None] * row / row.sum().square()).expand(channels, 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=channels)
    return torch.lerp(images, blurred, amount[:, None, None, None])


def vary_stain(images: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Vary stain and light: how much of it each colour absorbs, how colours mix, brightness of the background.

    The changes are made where they are linear, in optical density, minus the logarithm of the transmitted light.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): in [-1, 1].
        strength (`float`): 1 multiplies the density by 0.67 to 1.5.

    Source: Ruifrok and Johnston 2001, Quantification of histochemical staining by color deconvolution.
    """
    n, channels = images.shape[:2]

    def uniform(*shape):
        return (torch.rand(*shape, device=images.device) * 2 - 1) * strength

    density = -torch.log(((images + 1) / 2).clamp(min=1 / 255))
    factor = torch.exp(0.4 * uniform(n, 1) + 0.2 * uniform(n, channels))
    mixing = torch.eye(channels, device=images.device) * factor[:, :, None] + 0.1 * uniform(n, channels, channels)
    density = torch.einsum("nij,njhw->nihw", mixing, density)
    background = 0.12 * uniform(n, 1) + 0.08 * uniform(n, channels)  # density of the empty slide
    return torch.exp(-(density + background[:, :, None, None]).clamp(min=0)) * 2 - 1
