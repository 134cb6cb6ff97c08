"""Images degraded in known ways, and what brings them back: pipelines of ours, and common methods beside them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from visbio_diffusers import VisBioImg2ImgPipeline, VisBioInpaintPipeline, VisBioPipeline, VisBioRestorationPipeline


Method = Callable[[slice], np.ndarray]  # rows -> restored images, uint8 (n, height, width, channels)


class Bench:
    """Images, and for each task those that are given, and methods to restore them.

    Each task returns uint8 images `(n, height, width, channels)` as they are given, of several variants the last, and
    the methods by name.

    Args:
        pipe (`VisBioPipeline`): on its device.
        images (`np.ndarray` of shape `(n, side, side, channels)`): uint8 originals, of the model's size.
        captions (`list[str]`): what they show.
        num_inference_steps (`int`): of a whole sampling.
        seed (`int`): of holes and noise; image i is drawn from the seed i.
    """

    def __init__(
        self, pipe: VisBioPipeline, images: np.ndarray, captions: list[str], num_inference_steps: int, seed: int
    ):
        self.images, self.captions = images, captions
        self.num_inference_steps, self.seed = num_inference_steps, seed
        kinds = VisBioImg2ImgPipeline, VisBioInpaintPipeline, VisBioRestorationPipeline
        self.redraw, self.inpaint, self.restore = (kind(**pipe.components) for kind in kinds)
        for each in (self.redraw, self.inpaint, self.restore):
            each.set_progress_bar_config(disable=True)
        self.empty = pipe.encode_prompt("", do_classifier_free_guidance=False)[0]

    def ours(self, pipe, given: np.ndarray, captions: bool = False, draw: int = 0, **call) -> Method:
        """Return what a pipeline of ours draws of given images, each from a seed of its own."""

        def method(rows: slice) -> np.ndarray:
            seeds = range(len(self.images))[rows]
            text = {"prompt_embeds": self.empty.expand(len(seeds), -1, -1)}
            text = {"prompt": self.captions[rows]} if captions else text
            generators = [torch.Generator().manual_seed(draw * len(self.images) + seed) for seed in seeds]
            arrays = {name: value[rows] if isinstance(value, np.ndarray) else value for name, value in call.items()}
            steps = {"num_inference_steps": self.num_inference_steps, "guidance_scale": 1.0}
            images = pipe(image=given[rows], generator=generators, output_type="np", **text, **steps | arrays).images
            return (images * 255).round().astype(np.uint8)

        return method

    def holes(self, side: int) -> list[tuple[slice, slice]]:
        """Return a square hole at random for each image, `side` pixels wide.

        Raises:
            ValueError: if it is wider than the images.
        """
        most = min(self.images.shape[1:3])
        if not 1 <= side <= most:
            raise ValueError(f"a hole has from 1 to {most} pixels each way, not {side}")
        places = np.random.default_rng(self.seed).integers(0, most - side + 1, (len(self.images), 2))
        return [(slice(y, y + side), slice(x, x + side)) for y, x in places]

    def reconstruction(self, strengths: list[float]) -> tuple[np.ndarray, dict[str, Method]]:
        """Return the images themselves, and reconstructions from noised copies of them."""
        return self.images, {f"{each:g}": self.ours(self.redraw, self.images, strength=each) for each in strengths}

    def inpainting(self, side: int) -> tuple[np.ndarray, dict[str, Method]]:
        """Return images with black holes of `side` pixels each way, and ways to fill them."""
        from scipy.ndimage import distance_transform_edt
        from skimage.restoration import inpaint_biharmonic

        def nearest(image, mask):
            return image[tuple(distance_transform_edt(mask, return_distances=False, return_indices=True))]

        def biharmonic(image, mask):
            return _to_uint8(inpaint_biharmonic(image, mask > 0, channel_axis=-1))

        given, masks = self.images.copy(), np.zeros(self.images.shape[:3], np.uint8)
        for image, mask, hole in zip(given, masks, self.holes(side)):
            image[hole], mask[hole] = 0, 255
        methods = {"nearest pixel": _each(nearest, given, masks), "biharmonic": _each(biharmonic, given, masks)}
        for name, captions in (("ours, no text", False), ("ours, caption", True)):
            methods[name] = self.ours(self.inpaint, given, captions, mask_image=masks[..., None])
        return given, methods

    def super_resolution(self, factor: int) -> tuple[np.ndarray, dict[str, Method]]:
        """Return images reduced to means over squares of `factor` pixels, and ways to enlarge them."""
        pixels = torch.from_numpy(self.images).permute(0, 3, 1, 2).float()
        given = F.avg_pool2d(pixels, factor).round().byte().permute(0, 2, 3, 1).numpy()

        def resized(kind):
            size = self.images.shape[2], self.images.shape[1]
            return lambda image: np.asarray(Image.fromarray(image).resize(size, getattr(Image.Resampling, kind)))

        methods = {kind.lower(): _each(resized(kind), given) for kind in ("BILINEAR", "BICUBIC", "LANCZOS")}
        methods["ours"] = self.ours(self.restore, given, factor=factor)
        return given, methods

    def denoising(
        self, noise_stds: list[float], num_inference_steps: int, num_samples: int
    ) -> tuple[np.ndarray, dict[str, Method]]:
        """Return noisy images, and ways to clean those of all levels of noise; white is 1.

        The weights of the common methods are those of the highest PSNR of a few, on 64 images of the test split; that
        of non-local means is the lowest that was tried (model_cards/EXPERIMENTS.md).
        """
        from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

        def nl_means(image, std):
            options = {"patch_size": 3, "patch_distance": 7, "h": 0.6 * std, "sigma": std, "channel_axis": -1}
            return _to_uint8(denoise_nl_means(image / 255, **options))

        def total_variation(image, std):
            return _to_uint8(denoise_tv_chambolle(image / 255, weight=0.75 * std, channel_axis=-1))

        methods = {}
        for std in noise_stds:
            noise = np.random.default_rng(self.seed).standard_normal(self.images.shape)
            given = _to_uint8(self.images / 255 + std * noise)
            stds, at = np.full(len(given), std), f"noise {std:g}: "
            methods[f"{at}as it is"] = _each(lambda image: image, given)
            methods[f"{at}non-local means"] = _each(nl_means, given, stds)
            methods[f"{at}total variation"] = _each(total_variation, given, stds)
            call = {"noise_std": std, "num_inference_steps": num_inference_steps}
            draws = [self.ours(self.restore, given, draw=draw, **call) for draw in range(num_samples)]
            methods[f"{at}ours, sample"] = draws[0]
            methods[f"{at}ours, mean of {len(draws)} samples"] = _mean(draws)
            methods[f"{at}ours, one step"] = self.ours(self.restore, given, **call | {"num_inference_steps": 1})
        return given, methods


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def _each(function: Callable, *arrays: np.ndarray) -> Method:
    """Return a method that takes images one by one."""
    return lambda rows: np.stack([function(*each) for each in zip(*(array[rows] for array in arrays))])


def _mean(draws: list[Method]) -> Method:
    return lambda rows: np.mean([draw(rows) for draw in draws], axis=0).round().astype(np.uint8)
