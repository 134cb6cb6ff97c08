"""VisBioFusion: text-to-image diffusion models for biology, in Diffusers' terms."""

import importlib
import sys

from visbio_diffusers.models.unet_visbio import VisBioUNet
from visbio_diffusers.models.vision_visbio import VisBioVisionModel
from visbio_diffusers.pipelines.pipeline_visbio import VisBioPipeline
from visbio_diffusers.pipelines.pipeline_visbio_img2img import VisBioImg2ImgPipeline
from visbio_diffusers.pipelines.pipeline_visbio_inpaint import VisBioInpaintPipeline
from visbio_diffusers.pipelines.pipeline_visbio_restoration import VisBioRestorationPipeline
from visbio_diffusers.registration import register


__version__ = "0.1.0.dev0"

_LAZY = {
    "EmbeddingCache": "text",
    "default_model": "load",
    "load_bank": "captions",
    "load_dual_encoder": "alignment",
    "load_image_dataset": "data",
}
_PIPELINES = (VisBioPipeline, VisBioImg2ImgPipeline, VisBioInpaintPipeline, VisBioRestorationPipeline)
__all__ = [
    "VisBioImg2ImgPipeline",
    "VisBioInpaintPipeline",
    "VisBioPipeline",
    "VisBioRestorationPipeline",
    "VisBioUNet",
    "VisBioVisionModel",
    *_LAZY,
]

register(sys.modules[__name__], (VisBioUNet, *_PIPELINES))


def __getattr__(name):
    """Import the rest of the public names when they are first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'visbio_diffusers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"visbio_diffusers.{_LAZY[name]}"), name)
