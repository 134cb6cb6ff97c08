"""LoRA adapters on VisBioPipeline, in Diffusers' own terms and file format."""

from diffusers.loaders import StableDiffusionLoraLoaderMixin


class VisBioLoraLoaderMixin(StableDiffusionLoraLoaderMixin):
    """Load, save, fuse and weigh LoRA adapters of the UNet; the text encoder takes none."""

    _lora_loadable_modules = ["unet"]

    @classmethod
    def load_lora_into_text_encoder(cls, *args, **kwargs):
        """Do nothing: a BERT is not what Diffusers expects here."""

    def fuse_lora(self, components=("unet",), *args, **kwargs):
        """Merge adapters into the weights; arguments as in Diffusers."""
        super().fuse_lora(components, *args, **kwargs)

    def unfuse_lora(self, components=("unet",), **kwargs):
        """Take merged adapters out of the weights; arguments as in Diffusers."""
        super().unfuse_lora(components, **kwargs)
