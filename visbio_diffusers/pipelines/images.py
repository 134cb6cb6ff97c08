"""Images and masks given to a pipeline: PIL, NumPy or torch, as tensors of the model's size."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


MODES = {1: "L", 3: "RGB"}  # of PIL, by channels


def prepare_images(
    image, mask_image, channels: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return images and masks as tensors of one size.

    Args:
        image: a PIL image, a `np.ndarray` `(height, width, channels)` or `(batch, height, width, channels)`, a
            `torch.Tensor` `(channels, height, width)` or `(batch, channels, height, width)`, or a list of them; uint8,
            or float in [0, 1]. Grey ones may leave out the channels.
        mask_image: the same for one channel, with 0 and 1 (or 255) alone, each of the size of its image; or None.
        channels (`int`): of the model.
        height, width (`int`): of the result; other sizes are resized, images bicubic and masks to the nearest pixel.

    Returns:
        `(batch, channels, height, width)` float32 in [0, 1] and, unless `mask_image` is None, bool
        `(batch or 1, 1, height, width)`, True where the mask is 1.

    Raises:
        ValueError: for other types, channels, values or sizes; the message names the argument and the way out.
    """
    images = read_images("image", image, channels)
    pixels = torch.cat([_resize(each, height, width) for each in images])
    if mask_image is None:
        return pixels, None
    masks = read_images("mask_image", mask_image, 1)
    sizes = [tuple(each.shape[-2:]) for each in images for _ in each]
    mask_sizes = [tuple(each.shape[-2:]) for each in masks for _ in each]
    if len(mask_sizes) not in (1, len(sizes)):
        raise ValueError(f"{len(mask_sizes)} in `mask_image` for {len(sizes)} in `image`: give one, or one for each")
    for size, mask_size in zip(sizes, mask_sizes * (len(sizes) // len(mask_sizes)), strict=True):
        if size != mask_size:
            raise ValueError(
                f"`mask_image` of {mask_size[0]} x {mask_size[1]} pixels must have the size of `image`,"
                f" {size[0]} x {size[1]}"
            )
    if any(((mask != 0) & (mask != 1)).any() for mask in masks):
        raise ValueError(
            "`mask_image` has grey values: it takes 0 to keep and 1 (or 255) to draw, as mask_image.point(lambda v:"
            " 255 * (v > 127)) makes them"
        )
    return pixels, torch.cat([F.interpolate(mask, (height, width), mode="nearest-exact") for mask in masks]) > 0


def expand(name: str, images: torch.Tensor, num_prompts: int, num_images_per_prompt: int) -> torch.Tensor:
    """Return one of `images` for each image to draw.

    Args:
        name (`str`): of the argument, for the error.
        images (`torch.Tensor` of shape `(batch, ...)`): one for all prompts, or one for each.
        num_prompts (`int`), num_images_per_prompt (`int`): as in the pipelines.

    Raises:
        ValueError: if there is another number of them.
    """
    if len(images) not in (1, num_prompts):
        raise ValueError(f"{len(images)} in `{name}` for {num_prompts} prompts: give one, or one for each prompt")
    images = images.expand(num_prompts, *images.shape[1:])
    return images.repeat_interleave(num_images_per_prompt, dim=0)


def read_images(name: str, image, channels: int) -> list[torch.Tensor]:
    """Return tensors `(batch, channels, height, width)`, float32 in [0, 1], of images in any form.

    Args:
        name (`str`): of the argument, for the error.
        image, channels: as in [`prepare_images`].

    Raises:
        ValueError: for other types, channels or values.
    """
    if isinstance(image, list | tuple) and image:
        return [pixels for each in image for pixels in read_images(name, each, channels)]
    if isinstance(image, Image.Image):
        mode = MODES.get(channels)
        if name == "mask_image":
            image = image.convert(mode)  # masks are often saved in colours
        elif image.mode != mode:
            raise ValueError(f"`{name}` is a PIL image of mode {image.mode}: give {name}.convert({mode!r})")
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image, order="C"))  # torch takes no negative strides
        image = image if image.ndim == 2 else image.movedim(-1, -3) if image.ndim in (3, 4) else image
    if not isinstance(image, torch.Tensor):
        kind = "an empty list" if isinstance(image, list | tuple) else type(image).__name__
        raise ValueError(f"`{name}` must be a PIL image, an array, a tensor or a list of them, but is {kind}")
    if image.ndim == 2:
        image = image[None]
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != channels or 0 in image.shape:
        raise ValueError(
            f"`{name}` must have {channels} channel{'s' * (channels > 1)}, last in an array and before height and"
            f" width in a tensor, but has shape (batch, channels, height, width) {tuple(image.shape)}"
        )
    return [_as_float(name, image)]


def _as_float(name, image):
    if image.dtype == torch.uint8:
        return image.float() / 255
    if image.dtype != torch.bool and not image.is_floating_point():
        raise ValueError(f"`{name}` must be uint8, or float in [0, 1], but is {image.dtype}")
    image = image.float()
    if not ((image >= 0) & (image <= 1)).all():
        low, high = image.min().item(), image.max().item()
        raise ValueError(f"`{name}` must be uint8, or float in [0, 1], but its values reach from {low:g} to {high:g}")
    return image


def _resize(image, height, width):
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
