"""What a text-to-image model drew, and why: words and their places, noise and what comes of it, seeds, other words."""

from visbio_diffusers.explanation.attribution import HEADS, Attribution, attribute_image, attribute_words


__all__ = ["HEADS", "Attribution", "attribute_image", "attribute_words"]
