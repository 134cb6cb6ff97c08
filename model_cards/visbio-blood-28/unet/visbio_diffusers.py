"""VisBioUNet of visbio_diffusers 0.1.0.dev0, for people who have not installed it.

Made by the package from its own sources; change those instead. Apache-2.0.

visbio_diffusers/models/attention_visbio.py
visbio_diffusers/models/channels_last.py
visbio_diffusers/models/lora_scales.py
visbio_diffusers/models/safetensors_mixin.py
visbio_diffusers/models/unet_visbio.py
"""

import logging
import math
import torch
import torch.nn.functional as F
from collections.abc import Iterable
from diffusers.configuration_utils import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from torch import nn


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


def _check_config(block_out_channels, attention_head_dim, norm_num_groups, use_cross_attention, use_film):
    if len(block_out_channels) < 2:
        raise ValueError(f"block_out_channels needs at least two stages, got {tuple(block_out_channels)}")
    if block_out_channels[-1] % min(attention_head_dim, block_out_channels[-1]):
        raise ValueError(
            f"block_out_channels ends in {block_out_channels[-1]}, not a multiple of {attention_head_dim=}"
        )
    for channels in block_out_channels[:-1]:
        if channels % norm_num_groups:
            raise ValueError(f"block_out_channels {channels} is no multiple of norm_num_groups={norm_num_groups}")
    if not (use_cross_attention or use_film):
        raise ValueError("use_cross_attention and use_film are both off: text could not reach the image")


class VisBioAttnProcessor:
    """Compute scaled dot-product attention through Diffusers' dispatcher, so that every attention backend works."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, key_value=None):
        """Return attention of `hidden_states` (B, N, D) to itself, to `encoder_hidden_states`, or to a `key_value`."""
        if attn.fused_projections and not attn.is_cross_attention:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
            key_value = attn.heads_of_keys(key, value)
        else:
            query = attn.to_q(hidden_states)
        if key_value is None:
            key_value = attn.key_value(hidden_states if encoder_hidden_states is None else encoder_hidden_states)
        key, value = key_value
        query = attn.norm_q(query.unflatten(-1, (attn.heads, -1))).to(value.dtype)  # (B, N, heads, D / heads)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2)))


class VisBioAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with normalised queries and keys (Dehghani et al. 2023, ViT-22B), which bf16 and fp16 need.

    Args:
        query_dim (`int`): width of the tokens that ask, and of the output.
        heads (`int`): number of heads; `query_dim` is split among them.
        cross_attention (`bool`): keys and values come from `encoder_hidden_states` instead of the tokens themselves.
        dropout (`float`): after the output projection.
    """

    _default_processor_cls = VisBioAttnProcessor
    _available_processors = [VisBioAttnProcessor]

    def __init__(self, query_dim, heads, cross_attention=False, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.is_cross_attention = cross_attention
        self.use_bias = False
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(query_dim, query_dim, bias=False)
        self.to_v = nn.Linear(query_dim, query_dim, bias=False)
        self.norm_q = nn.RMSNorm(query_dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(query_dim // heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim), nn.Dropout(dropout)])
        self.set_processor(VisBioAttnProcessor())

    def heads_of_keys(self, key, value):
        """Split projected keys and values into heads and normalise the keys: two of (B, L, heads, D / heads)."""
        value = value.unflatten(-1, (self.heads, -1))
        return self.norm_k(key.unflatten(-1, (self.heads, -1))).to(value.dtype), value

    def key_value(self, hidden_states):
        """Project tokens (B, L, D) to keys and values, split into heads."""
        if self.is_cross_attention and self.fused_projections:
            return self.heads_of_keys(*self.to_kv(hidden_states).chunk(2, dim=-1))
        return self.heads_of_keys(self.to_k(hidden_states), self.to_v(hidden_states))

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, key_value=None):
        """Apply the processor; arguments as in `VisBioAttnProcessor.__call__`."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, key_value)


class VisBioTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; FiLM of time and text on the first and the last.

    FiLM (scale, shift, gate) starts at zero, so that each new block begins as the identity apart from the text
    (Perez et al. 2018; Peebles & Xie 2023, adaLN-Zero).
    """

    def __init__(self, dim, heads, film_dim, cross_attention, mlp_ratio, dropout):
        super().__init__()
        self.film = nn.Linear(film_dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn1 = VisBioAttention(dim, heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6) if cross_attention else None
        self.attn2 = VisBioAttention(dim, heads, cross_attention=True, dropout=dropout) if cross_attention else None
        self.norm3 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu", dropout=dropout)

    def forward(self, hidden_states, film, attention_mask=None, key_value=None):
        """Map tokens (B, N, D) to tokens, given the FiLM vector (B, F) and the text's keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.film(film).unsqueeze(1).chunk(6, dim=-1)  # (B, 1, D)
        normed = torch.addcmul(shift1, self.norm1(hidden_states), 1 + scale1)
        hidden_states = torch.addcmul(hidden_states, gate1, self.attn1(normed))
        if self.attn2 is not None:
            text = self.attn2(self.norm2(hidden_states), attention_mask=attention_mask, key_value=key_value)
            hidden_states = hidden_states + text
        normed = torch.addcmul(shift2, self.norm3(hidden_states), 1 + scale2)
        return torch.addcmul(hidden_states, gate2, self.ff(normed))


class VisBioMidBlock(nn.Module, CacheMixin):
    """The transformer at the lowest resolution; positions are a fixed 2-D sinusoid, so any grid size works."""

    def __init__(self, dim, num_layers, heads, film_dim, cross_attention, mlp_ratio, dropout):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(
            VisBioTransformerBlock(dim, heads, film_dim, cross_attention, mlp_ratio, dropout)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=1e-6)


def _is_kept(images):
    return torch.compiler.is_compiling() and images.is_contiguous(memory_format=torch.channels_last)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, affine; compiled for channels-last images it keeps their layout and dtype."""

    def forward(self, hidden_states):
        """Normalise (B, C, H, W); statistics are in float32."""
        if not _is_kept(hidden_states):
            return super().forward(hidden_states)
        rows = hidden_states.permute(0, 2, 3, 1).float()  # (B, H, W, C)
        variance, mean = torch.var_mean(rows, dim=(1, 2), correction=0)  # of channels, whose rows are read as they lie
        variance, mean, weight, bias = (
            each.unflatten(-1, (self.num_groups, -1))
            for each in (variance, mean, self.weight.float(), self.bias.float())
        )
        between, mean = torch.var_mean(mean, dim=2, correction=0, keepdim=True)  # (B, G, 1)
        scale = weight * torch.rsqrt(variance.mean(dim=2, keepdim=True) + between + self.eps)  # (B, G, C / G)
        shift = bias - mean * scale
        scale, shift = (each.flatten(1)[:, None, None] for each in (scale, shift))
        return torch.addcmul(shift, rows, scale).to(hidden_states.dtype).permute(0, 3, 1, 2)


def sinusoidal_positions(height, width, dim, device, dtype):
    """Return fixed 2-D positions (1, height * width, dim): half of the channels for rows, half for columns.

    Source: Vaswani et al. 2017, section 3.5, once per axis.
    """
    frequencies = torch.exp(torch.arange(dim // 4, device=device) * (-math.log(10_000) / max(dim // 4 - 1, 1)))
    axes = [torch.arange(size, device=device)[:, None] * frequencies for size in (height, width)]
    rows, columns = (torch.cat([axis.sin(), axis.cos()], dim=-1) for axis in axes)  # (size, dim / 2)
    grid = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
    return F.pad(grid, (0, dim - grid.shape[-1])).reshape(1, height * width, dim).to(dtype)


def _check(scale: float | dict | list, at: tuple, places: set[tuple]) -> None:
    within = [place[-1] for place in places if place[:-1] == at and len(place) == len(at) + 1]
    named = " of ".join(["adapter", *map(str, at)][::-1])
    if isinstance(scale, dict):
        for key, value in scale.items():
            if key not in within or isinstance(key, int):
                raise ValueError(f"{named} has no block {key!r}: it has {', '.join(sorted(map(str, within)))}")
            _check(value, (*at, key), places)
    elif isinstance(scale, list):
        if len(scale) != sum(isinstance(key, int) for key in within):
            raise ValueError(f"{named} has {len(scale)} weights {scale}: give one for each block within it")
    elif not isinstance(scale, (int, float)):
        raise ValueError(f"{named} has the weight {scale!r}: give a number")


def _scale_at(place: tuple[str | int, ...], scale: float | dict | list) -> float:
    for key in place:
        if isinstance(scale, dict):
            scale = scale.get(key, 1.0)
        elif isinstance(scale, list):
            scale = scale[key]
    return float(scale) if isinstance(scale, (int, float)) else 1.0  # a list of blocks, of what is beside them


def _place(name: str) -> tuple[str | int, ...]:
    """Return where a module is in the dict of weights: ("mid", 3), ("down", "block_0", 1), ("up", "block_1"), ()."""
    part, number, inner, index, *_ = [*name.split("."), "", "", "", ""]
    if part == "mid_block":  # mid_block.transformer_blocks.3.attn1.to_q
        return ("mid", int(inner)) if inner.isdigit() else ("mid",)
    if part not in ("down_blocks", "up_blocks"):
        return ()
    place = part.removesuffix("_blocks"), f"block_{number}"  # down_blocks.0.resnets.1.conv1, down_blocks.0.downsampler
    return () if not number else (*place, int(index)) if index.isdigit() else place


def layer_scales(
    layers: Iterable[str], scale: float | dict, modules: Iterable[str] | None = None
) -> float | dict[str, float]:
    """Return the weight of an adapter in every layer.

    Args:
        layers (`Iterable[str]`): names of the adapted layers, such as "down_blocks.0.resnets.1.conv1".
        scale (`float` or `dict`): one weight for all, or those of "down", "mid" and "up": a number each; of "down" and
            "up" also a dict from "block_0" and so on to a number or to a list with one number for each residual block;
            of "mid" a list with one number for each transformer block. What is not named has weight 1.
        modules (`Iterable[str]`, *optional*): names of all modules of the model, whose blocks may be named also where
            none of their layers is adapted; by default `layers`.

    Returns:
        The number, or a dict from layer to number.

    Raises:
        ValueError: if the dict names blocks that the model lacks, or a list has not one number for each block.
    """
    if not isinstance(scale, dict):
        return scale
    layers = list(layers)
    places = {place[:end] for name in modules or layers for place in [_place(name)] for end in range(len(place) + 1)}
    _check(scale, (), places)
    return {layer: _scale_at(_place(layer), scale) for layer in layers}


class VisBioTextBlock(nn.Module):
    """One pre-norm transformer block over text tokens, which adapts a frozen text encoder to images."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn1 = VisBioAttention(dim, heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=2 * dim, activation_fn="gelu", dropout=dropout)

    def forward(self, hidden_states, attention_mask):
        """Map text tokens (B, L, D) to text tokens."""
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), attention_mask=attention_mask)
        return hidden_states + self.ff(self.norm2(hidden_states))


class VisBioResnetBlock(nn.Module):
    """Two 3x3 convolutions with group norm, FiLM on the second norm, and a residual path."""

    def __init__(self, in_channels, out_channels, film_dim, norm_num_groups, dropout):
        super().__init__()
        self.norm1 = GroupNorm(norm_num_groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(film_dim, 2 * out_channels)
        self.norm2 = GroupNorm(norm_num_groups, out_channels, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states, film):
        """Map (B, C, H, W) to (B, C', H, W), given the FiLM vector (B, F)."""
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        scale, shift = self.film(film)[:, :, None, None].chunk(2, dim=1)
        hidden_states = torch.addcmul(shift, self.norm2(hidden_states), 1 + scale)
        return residual + self.conv2(self.dropout(F.silu(hidden_states)))


class VisBioDownBlock(nn.Module):
    """Residual blocks at one resolution, then a 2x2 convolution of stride 2."""

    def __init__(self, channels, out_channels, num_layers, film_dim, norm_num_groups, dropout):
        super().__init__()
        self.resnets = nn.ModuleList(
            VisBioResnetBlock(channels, channels, film_dim, norm_num_groups, dropout) for _ in range(num_layers)
        )
        self.downsampler = nn.Conv2d(channels, out_channels, 2, stride=2)

    def forward(self, hidden_states, film, run):
        """Return (B, C', H / 2, W / 2) and the long skip (B, C, H, W); `run` calls a residual block."""
        for resnet in self.resnets:
            hidden_states = run(resnet, hidden_states, film)
        return self.downsampler(hidden_states), hidden_states


def pixel_shuffle(images, factor):
    """Turn (B, C * factor^2, H, W) into (B, C, factor * H, factor * W), as `torch.nn.functional.pixel_shuffle`."""
    if not _is_kept(images):
        return F.pixel_shuffle(images, factor)
    height, width = images.shape[-2:]
    parts = images.permute(0, 2, 3, 1).unflatten(3, (-1, factor, factor))  # (B, H, W, C, f, f)
    parts = parts.permute(0, 1, 4, 2, 5, 3)  # (B, H, f, W, f, C)
    return parts.reshape(len(images), factor * height, factor * width, -1).permute(0, 3, 1, 2)


class VisBioUpBlock(nn.Module):
    """Upsample by two (1x1 convolution and pixel shuffle), join the long skip, then residual blocks."""

    def __init__(self, in_channels, channels, num_layers, film_dim, norm_num_groups, dropout):
        super().__init__()
        self.upsampler = nn.Conv2d(in_channels, 4 * channels, 1)
        self.resnets = nn.ModuleList(
            VisBioResnetBlock(2 * channels if i == 0 else channels, channels, film_dim, norm_num_groups, dropout)
            for i in range(num_layers)
        )

    def forward(self, hidden_states, skip, film, run):
        """Return (B, C, 2 H, 2 W) of the input and the encoder's state `skip`; `run` calls a residual block."""
        hidden_states = torch.cat([pixel_shuffle(self.upsampler(hidden_states), 2), skip], dim=1)
        for resnet in self.resnets:
            hidden_states = run(resnet, hidden_states, film)
        return hidden_states


logger = logging.getLogger(__name__)


class VisBioUNet(SafetensorsMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """Denoise images given text: a convolutional U-Net whose lowest resolution is a transformer.

    Text enters by cross-attention in each transformer block and by FiLM (its mean, added to the timestep
    embedding) in every block; either route can be switched off for ablation.

    Args:
        sample_size (`int`): the side that the pipeline draws by default, in pixels; any multiple of
            `downsample_factor` works in `forward`.
        in_channels, out_channels (`int`): 3 for colour, 1 for grey.
        block_out_channels (`tuple[int, ...]`): channels of each convolutional stage; the last is the width of the
            transformer. Each stage but the last halves the resolution.
        layers_per_block (`int`): residual blocks per convolutional stage, on the way down and on the way up.
        num_transformer_layers (`int`): transformer blocks at the lowest resolution.
        attention_head_dim (`int`): width of one attention head.
        cross_attention_dim (`int`): width of the text encoder's hidden states.
        num_text_layers (`int`): transformer blocks over the text tokens before they meet the image.
        film_dim (`int`): width of the vector (timestep and mean text) from which FiLM is computed.
        mlp_ratio (`float`): hidden width of the feed-forward over that of the tokens.
        norm_num_groups (`int`): groups of every group norm; divides each of `block_out_channels[:-1]`.
        use_cross_attention, use_film (`bool`): the two routes of the text.
        dropout (`float`): in residual blocks, attention and feed-forward.

    Raises:
        ValueError: if channels, heads and groups do not divide, or both text routes are off.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["VisBioTransformerBlock", "VisBioResnetBlock", "VisBioTextBlock"]
    _repeated_blocks = ["VisBioTransformerBlock"]  # all of one shape; residual blocks are not
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "conv_in", "conv_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (32, 96, 256),
        layers_per_block: int = 2,
        num_transformer_layers: int = 6,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 192,
        num_text_layers: int = 1,
        film_dim: int = 192,
        mlp_ratio: float = 3.0,
        norm_num_groups: int = 16,
        use_cross_attention: bool = True,
        use_film: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        dim = block_out_channels[-1]
        _check_config(block_out_channels, attention_head_dim, norm_num_groups, use_cross_attention, use_film)
        heads = max(dim // attention_head_dim, 1)
        self.downsample_factor = 2 ** (len(block_out_channels) - 1)

        # timestep and text
        self.time_proj = Timesteps(film_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(film_dim, film_dim)
        self.text_in = nn.Sequential(nn.LayerNorm(cross_attention_dim), nn.Linear(cross_attention_dim, dim))
        self.text_blocks = nn.ModuleList(VisBioTextBlock(dim, heads, dropout) for _ in range(num_text_layers))
        self.text_norm = nn.LayerNorm(dim, eps=1e-6)
        self.text_film = nn.Linear(dim, film_dim) if use_film else None

        # stages
        stages = list(zip(block_out_channels[:-1], block_out_channels[1:]))
        shared = (layers_per_block, film_dim, norm_num_groups, dropout)
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(VisBioDownBlock(low, high, *shared) for low, high in stages)
        self.mid_block = VisBioMidBlock(
            dim, num_transformer_layers, heads, film_dim, use_cross_attention, mlp_ratio, dropout
        )
        self.up_blocks = nn.ModuleList(VisBioUpBlock(high, low, *shared) for low, high in reversed(stages))
        self.conv_norm_out = GroupNorm(norm_num_groups, block_out_channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)

        self.gradient_checkpointing = False
        for module in self.modules():  # FiLM and residual branches start at zero
            if isinstance(module, (VisBioTransformerBlock, VisBioResnetBlock)):
                nn.init.zeros_(module.film.weight)
                nn.init.zeros_(module.film.bias)

    def save_pretrained(
        self,
        save_directory,
        is_main_process=True,
        save_function=None,
        safe_serialization=True,
        variant=None,
        max_shard_size="10GB",
        **kwargs,
    ):
        """Save to a folder; arguments as in Diffusers, but that no pickle is written without `safe_serialization`."""
        if not safe_serialization:
            logger.warning("weights are saved as .safetensors all the same: a pickle can run code when it is loaded")
        args = save_directory, is_main_process, save_function, True, variant, max_shard_size
        super().save_pretrained(*args, **kwargs)

    def set_adapters(self, adapter_names, weights=None):
        """Activate LoRA adapters with their weights.

        Args:
            adapter_names (`str` or `list[str]`): those to use.
            weights (`float` or `dict`, or a list with one for each, *optional*): one number, or numbers by block as
                in [`layer_scales`]; 1 where left out.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        weights = weights if isinstance(weights, list) else [weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"got {len(weights)} weights for {len(names)} adapters: give one for each")
        modules = dict(self.named_modules())
        layers = [name for name, module in modules.items() if hasattr(module, "base_layer")]  # adapted by PEFT
        scales = [layer_scales(layers, 1.0 if weight is None else weight, modules) for weight in weights]
        set_weights_and_activate_adapters(self, names, scales)

    # Diffusers' caches look for `transformer_blocks` among the children of what they are enabled on

    @property
    def is_cache_enabled(self):
        """Whether a cache is enabled."""
        return self.mid_block.is_cache_enabled

    def enable_cache(self, config):
        """Enable one of Diffusers' caches on the transformer; names of layers in `config` are those in `mid_block`."""
        self.mid_block.enable_cache(config)

    def disable_cache(self):
        """Disable the cache."""
        self.mid_block.disable_cache()

    def cache_context(self, name, **kwargs):
        """Return a context manager that keeps the cached states of one kind of call apart from those of others."""
        return self.mid_block.cache_context(name, **kwargs)

    def _run(self, block, *args):
        """Call a block, through activation checkpointing where that is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _text(self, encoder_hidden_states, encoder_attention_mask):
        """Return what the text gives at every timestep: attention mask, FiLM part, keys and values of each block."""
        mask = None
        if encoder_attention_mask is not None:
            mask = encoder_attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        hidden_states = self.text_in(encoder_hidden_states)  # (B, L, D)
        for block in self.text_blocks:
            hidden_states = self._run(block, hidden_states, mask)
        hidden_states = self.text_norm(hidden_states)

        film = None
        if self.text_film is not None:
            if encoder_attention_mask is None:
                pooled = hidden_states.mean(dim=1)
            else:
                weight = encoder_attention_mask.to(hidden_states.dtype)
                weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
                pooled = torch.einsum("bl,bld->bd", weight, hidden_states)
            film = self.text_film(pooled)
        blocks = self.mid_block.transformer_blocks
        key_values = [None if b.attn2 is None else b.attn2.key_value(hidden_states) for b in blocks]
        return {"mask": mask, "film": film, "key_values": key_values}

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        text_cache: dict | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple:
        """Predict noise, velocity or clean image, as the scheduler's `prediction_type` says.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): noised image, clean range [-1, 1].
            timestep (`torch.Tensor` of shape `(batch,)` or a number): 0 = clean.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, tokens, cross_attention_dim)`): text features.
            encoder_attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): nonzero = attend,
                zero = padding. Without it every token counts.
            cross_attention_kwargs (`dict`, *optional*): `{"scale": float}` scales loaded LoRA adapters.
            text_cache (`dict`, *optional*): an empty dict is filled with what the text gives to every block; passed
                again with the same text at the next timestep, it saves that work. Only without gradients.
            return_dict (`bool`): whether to return a `UNet2DConditionOutput` or a tuple.

        Returns:
            `UNet2DConditionOutput` or `tuple` with `sample` of the input's shape.

        Raises:
            ValueError: if height or width is no multiple of `downsample_factor`, or the text has another width.
        """
        if sample.shape[-2] % self.downsample_factor or sample.shape[-1] % self.downsample_factor:
            raise ValueError(
                f"height and width must be multiples of {self.downsample_factor}, got {tuple(sample.shape[-2:])}"
            )
        if encoder_hidden_states.shape[-1] != self.config.cross_attention_dim:
            raise ValueError(
                f"encoder_hidden_states has width {encoder_hidden_states.shape[-1]}, this model takes "
                f"{self.config.cross_attention_dim}: encode the prompt with the text encoder it was trained with"
            )

        # 1. text: the same at all timesteps
        text = text_cache if text_cache else self._text(encoder_hidden_states, encoder_attention_mask)
        if text_cache is not None and not text_cache:
            text_cache.update(text)

        # 2. time
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time_dtype = self.time_embedding.linear_1.weight.dtype
        film = self.time_embedding(self.time_proj(timestep).to(time_dtype)).to(sample.dtype)  # (B, F)
        film = F.silu(film if text["film"] is None else film + text["film"])

        # 3. down
        hidden_states = self.conv_in(sample)
        skips = []
        for block in self.down_blocks:
            hidden_states, skip = block(hidden_states, film, self._run)
            skips.append(skip)

        # 4. transformer
        _, dim, height, width = hidden_states.shape
        hidden_states = hidden_states.flatten(2).transpose(1, 2).contiguous()  # (B, N, D); else each norm copies them
        positions = sinusoidal_positions(height, width, dim, hidden_states.device, hidden_states.dtype)
        hidden_states = hidden_states + positions
        for block, key_value in zip(self.mid_block.transformer_blocks, text["key_values"]):
            hidden_states = self._run(block, hidden_states, film, text["mask"], key_value)
        hidden_states = self.mid_block.norm_out(hidden_states)
        hidden_states = hidden_states.transpose(1, 2).unflatten(2, (height, width))  # (B, D, H', W')

        # 5. up
        for block in self.up_blocks:
            hidden_states = block(hidden_states, skips.pop(), film, self._run)
        sample = self.conv_out(F.silu(self.conv_norm_out(hidden_states)))
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)
