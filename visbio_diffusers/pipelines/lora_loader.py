"""LoRA adapters on VisBioPipeline, in Diffusers' own terms and file format."""

from diffusers.loaders import StableDiffusionLoraLoaderMixin


class VisBioLoraLoaderMixin(StableDiffusionLoraLoaderMixin):
    """Load, save, fuse and weigh LoRA adapters of the UNet; the text encoder takes none."""

    _lora_loadable_modules = ["unet"]

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """Return the weights of an adapter; arguments as in Diffusers.

        A pickle (.bin) is taken only where its name is given, or with `use_safetensors=False`; of it torch loads
        tensors alone.
        """
        named = kwargs.get("weight_name") or str(pretrained_model_name_or_path_or_dict).endswith(".bin")
        if kwargs.get("use_safetensors") is None and not named:
            kwargs["use_safetensors"] = True
        return super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)

    @classmethod
    def load_lora_into_unet(cls, state_dict, network_alphas, unet, **kwargs):
        """Add an adapter to the UNet; arguments as in Diffusers.

        Raises:
            ValueError: if the adapter was made for another model; the message names the layer.
        """
        check_fit(state_dict, unet)
        super().load_lora_into_unet(state_dict, network_alphas, unet, **kwargs)
        unet.train(unet.training)  # new layers begin in training mode, in which their dropout draws

    @classmethod
    def load_lora_into_text_encoder(cls, *args, **kwargs):
        """Do nothing: a BERT is not what Diffusers expects here."""

    def fuse_lora(self, components=("unet",), *args, **kwargs):
        """Merge adapters into the weights; arguments as in Diffusers."""
        super().fuse_lora(components, *args, **kwargs)

    def unfuse_lora(self, components=("unet",), **kwargs):
        """Take merged adapters out of the weights; arguments as in Diffusers."""
        super().unfuse_lora(components, **kwargs)


def check_fit(state_dict, unet) -> None:
    """Raise a ValueError naming the first layer of an adapter that `unet` lacks, or has in another size.

    Args:
        state_dict (`dict[str, torch.Tensor]`): keys in Diffusers' format, `unet.LAYER.lora_A.weight` and `lora_B`.
        unet (`torch.nn.Module`): with or without adapters.
    """
    layers = dict(unet.named_modules())
    for key, weight in state_dict.items():
        part, _, name = key.partition(".")
        if name and part != "unet":
            raise ValueError(
                f"the adapter was made for another model: it holds {key}, and only a `unet` takes adapters"
            )
        name = name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")  # Diffusers' older format
        name, _, matrix = name.partition(".lora_")
        if matrix not in ("A.weight", "B.weight"):
            continue
        layer = getattr(layers.get(name), "base_layer", layers.get(name))
        if not hasattr(layer, "weight"):
            raise ValueError(f"the adapter was made for another model: this one has no layer {name}")
        own = layer.weight.shape
        # A is (rank, in, ...), B is (out, rank, ...), of a layer (out, in, ...)
        sizes = (weight.shape[1:], own[1:]) if matrix == "A.weight" else (weight.shape[:1], own[:1])
        if sizes[0] != sizes[1]:
            side = "takes" if matrix == "A.weight" else "gives"
            raise ValueError(
                f"the adapter was made for another model: its layer {name} {side} {tuple(sizes[0])} features, "
                f"this model's {tuple(sizes[1])}"
            )
