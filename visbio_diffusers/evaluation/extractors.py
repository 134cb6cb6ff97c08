"""Feature extractors of the user's own: DINOv2 and its like from a folder, Inception-2048 from a TorchScript file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel

from visbio_diffusers.files import one_line


class TransformersExtractor(nn.Module):
    """A vision model of Transformers, such as DINOv2, that lies in a folder; its features are its pooled output.

    Args:
        folder (`str` or `Path`): config.json, preprocessor_config.json and weights as safetensors.

    Raises:
        ValueError: if the folder is incomplete or its model has no pooled output.
    """

    def __init__(self, folder: str | Path):
        """Load model and preprocessing, offline."""
        super().__init__()
        try:
            processing = json.loads(Path(folder, "preprocessor_config.json").read_text())
            settings = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
            self.net = AutoModel.from_pretrained(folder, **settings)
            size = processing.get("crop_size") or processing["size"]
            self.side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
            for name in ("image_mean", "image_std"):
                self.register_buffer(name, torch.tensor(processing[name]).reshape(1, 3, 1, 1))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no vision model of Transformers as safetensors: {one_line(error)}"
            ) from error
        self.config = {"type": type(self.net).__name__, "side": self.side}

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, 1 or 3, height, width)` in [-1, 1] to `(batch, d)`."""
        pixel_values = pixel_values.expand(-1, 3, -1, -1)
        resized = F.interpolate(pixel_values, (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)
        output = self.net(pixel_values=((resized + 1) / 2 - self.image_mean) / self.image_std)
        return output.pooler_output.flatten(1)


class TorchScriptExtractor(nn.Module):
    """A TorchScript file that takes uint8 images and `return_features=True`, as inception-2015-12-05.pt does.

    That file holds the Inception-2048 weights of the published FID; it lies in NVIDIA's catalogue of StyleGAN3.

    Args:
        path (`str` or `Path`): the file.

    Raises:
        ValueError: if it is no TorchScript.
    """

    def __init__(self, path: str | Path):
        """Load the file, offline. It holds a program, which runs: take it only from whom you trust."""
        super().__init__()
        try:
            self.net = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript file: see --help") from error
        self.config = {"type": "TorchScript"}

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, 1 or 3, height, width)` in [-1, 1] to `(batch, d)`."""
        images = ((pixel_values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.net(images.expand(-1, 3, -1, -1).contiguous(), return_features=True)


def load_extractor(source: str, device: str = "cpu") -> tuple[str, nn.Module]:
    """Return the name (of the folder, or of the file without its ending) and the network in evaluation mode.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if it is neither kind of extractor.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no extractor {source}: give a folder of Transformers, or a TorchScript file")
    extractor = (TransformersExtractor(path) if path.is_dir() else TorchScriptExtractor(path)).to(device).eval()
    try:
        with torch.no_grad():
            shape = extractor.features(torch.zeros(2, 3, 32, 32, device=device)).shape
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"extractor {source} gives no features of images: {one_line(error)}") from error
    if len(shape) != 2 or shape[0] != 2:
        raise ValueError(f"extractor {source} gives {tuple(shape)} for two images, not one row of features for each")
    return path.resolve().stem if path.is_file() else path.resolve().name, extractor
