"""Images and texts in one space: what an image shows, which image a text means, and why."""

from visbio_diffusers.alignment.dual_encoder import Calibration, DualEncoder, calibrate, load_dual_encoder
from visbio_diffusers.alignment.zero_shot import caption_ensembles, classify


__all__ = ["Calibration", "DualEncoder", "calibrate", "caption_ensembles", "classify", "load_dual_encoder"]
