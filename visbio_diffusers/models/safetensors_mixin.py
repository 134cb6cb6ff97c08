"""Weights in a pickle can run code when they are loaded, so they are refused unless somebody asks for them."""


class SafetensorsMixin:
    """Make `from_pretrained` of a model or a pipeline take .safetensors weights alone."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load from a folder or the Hub; arguments as in Diffusers.

        Raises:
            OSError: if there are no .safetensors weights, and `use_safetensors` is not False.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
