"""Where in an image, drawn or given, the words of a prompt are read: maps from the cross-attention.

Shapes in trailing comments: n images, N image tokens, L text tokens, H x W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.models.attention_visbio import VisBioAttention
from visbio_diffusers.rollouts import encode_prompts, predict
from visbio_diffusers.text import check_texts, max_tokens


WORD = re.compile(r"\w(?:\S*\w)?")  # from the first to the last letter or digit between two spaces
LEVELS = 0.2, 0.35, 0.5, 0.65
# Of models that we ship: the (layer, head) whose maps found cells and nuclei best on training images, see
# train_scripts/evaluate_attribution.py. Over all heads a map says little: some read a cell's name around the cell.
HEADS = {"visbio-blood-28": ((1, 0), (1, 3), (0, 3))}


class Attribution(NamedTuple):
    """An image with a map for each word of a prompt.

    Args:
        image (`PIL.Image.Image`): given, or as the pipeline draws it without maps.
        words (`list[str]`): of the prompt, in its order, as it spells them, without punctuation around them.
        maps (`np.ndarray` of shape `(words, height, width)`): float32, 0 or more; at each pixel the words' shares of
            the attention sum to 1. What went to punctuation and to the tokens of start and end is left out.
        weight (`float`): the part of all attention, in [0, 1], that went to the words, as a mean over the image.
    """

    image: Image.Image
    words: list[str]
    maps: np.ndarray
    weight: float


class AttentionRecorder:
    """Record a UNet's cross-attention while it denoises, without changing what comes of it.

    A context manager: hooks compute the probabilities beside each layer, which itself runs as always, and are gone
    afterwards.

    Args:
        unet (`VisBioUNet` or `UNet2DConditionModel`): the one that draws.
        num_images (`int`): drawn together; with guidance, only the half with text is recorded, which comes last.
        heads (`Sequence[tuple[int, int]]`, *optional*): layers with cross-attention, counted from 0 in the order of
            the modules, and which of their heads to record; default is all.

    Raises:
        ValueError: if the UNet has no cross-attention, or no such head.
    """

    def __init__(self, unet, num_images: int, heads: Sequence[tuple[int, int]] | None = None):
        self.unet = unet
        self.num_images = num_images
        self.layers = [module for module in unet.modules() if getattr(module, "is_cross_attention", False)]
        if not self.layers:
            name = type(unet).__name__
            raise ValueError(f"this {name} has no cross-attention, so that words have no places: use a model with it")
        self.heads = all_heads(unet) if heads is None else list(heads)
        absent = set(self.heads) - set(all_heads(unet))
        if absent or not self.heads:
            raise ValueError(
                f"no head {sorted(absent)} in this model: give pairs of one of {len(self.layers)} layers and its head"
            )
        self._sides = (0, 0)
        self._sums: dict[tuple[int, int], torch.Tensor] = {}  # grid of image tokens -> (n, L, N)
        self._handles: list[Any] = []

    def __enter__(self) -> AttentionRecorder:
        self._handles = [self.unet.register_forward_pre_hook(self._see_sample, with_kwargs=True)]
        for number, layer in enumerate(self.layers):
            chosen = [head for place, head in self.heads if place == number]
            if chosen:
                record = partial(self._record, chosen)
                self._handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def _see_sample(self, unet, args, kwargs) -> None:
        self._sides = tuple((args[0] if args else kwargs["sample"]).shape[-2:])

    def _record(self, heads: list[int], layer, args, kwargs) -> None:
        n = self.num_images
        given = {name: value for name, value in kwargs.items() if value is not None}
        hidden_states = (args[0] if args else given["hidden_states"])[-n:]
        mask = given.get("attention_mask")
        mask = None if mask is None else mask[-n:]
        if isinstance(layer, VisBioAttention):
            key_value = given.get("key_value") or layer.key_value(given["encoder_hidden_states"])
            found = _visbio_probabilities(layer, hidden_states, key_value[0][-n:], mask)
        else:
            found = _diffusers_probabilities(layer, hidden_states, given["encoder_hidden_states"][-n:], mask)
        grid = _grid(found.shape[-1], *self._sides)
        self._sums[grid] = self._sums.get(grid, 0) + found[:, heads].sum(dim=1)

    def token_maps(self, height: int, width: int) -> torch.Tensor:
        """Return the mean attention to each token, `(num_images, tokens, height, width)`, float32 on the CPU.

        The mean is over the heads and steps; at each pixel it sums to 1 over all tokens. The grid of each layer
        (7 x 7 in a model of 28 pixels) is brought to the image by bilinear interpolation, which adds no detail.
        """
        total = torch.zeros(())
        for grid, found in self._sums.items():
            total = total + F.interpolate(found.unflatten(2, grid).cpu(), (height, width), mode="bilinear")
        return total / total.sum(dim=1, keepdim=True)


def _visbio_probabilities(layer, hidden_states, key, mask) -> torch.Tensor:
    """Return the attention (n, heads, L, N) of a layer of VisBioUNet."""
    query = layer.norm_q(layer.to_q(hidden_states).unflatten(-1, (layer.heads, -1)))
    scores = torch.einsum("bnhd,blhd->bhln", query.float(), key.float()) * key.shape[-1] ** -0.5
    if mask is not None:  # (n, 1, 1, L)
        scores = scores.masked_fill(~mask.transpose(-1, -2), -torch.inf)
    return scores.softmax(dim=2)


def _diffusers_probabilities(layer, hidden_states, encoder_hidden_states, mask) -> torch.Tensor:
    """Return the same of a layer of Diffusers' own UNets."""
    n, tokens = encoder_hidden_states.shape[:2]
    query = layer.head_to_batch_dim(layer.to_q(hidden_states))
    key = layer.head_to_batch_dim(layer.to_k(encoder_hidden_states))
    found = layer.get_attention_scores(query, key, layer.prepare_attention_mask(mask, tokens, n))
    return found.float().unflatten(0, (n, -1)).transpose(2, 3)


def all_heads(unet) -> list[tuple[int, int]]:
    """Return layer and head of all of a UNet's cross-attention, as [`AttentionRecorder`] counts them."""
    layers = [module for module in unet.modules() if getattr(module, "is_cross_attention", False)]
    return [(number, head) for number, layer in enumerate(layers) for head in range(layer.heads)]


def _grid(num_tokens: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of image tokens, of a sample whose sides are halved, rounded up, some times."""
    while height * width > num_tokens:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def word_tokens(tokenizer, text: str, limit: int) -> list[tuple[str, list[int]]]:
    """Return each word of a text with the places of its tokens, counted with the special ones.

    A word is what stands between spaces, without punctuation at its ends: "Wright-Giemsa" is one, whatever number
    of pieces the tokenizer makes of it.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): one that knows where in the text its tokens stand.
        text (`str`): what to split.
        limit (`int`): tokens after that are cut off; a word without any is left out.

    Raises:
        ValueError: if there is no word, or the tokenizer does not know places.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot say where its tokens stand: load the fast one of its kind"
        )
    places = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for word in WORD.finditer(text):
        tokens = [k for k, (start, end) in enumerate(places) if max(start, word.start()) < min(end, word.end())]
        if tokens:
            found.append((word.group(), tokens))
    if not found:
        raise ValueError(f"the prompt {text!r} has no word: describe the image")
    return found


@torch.no_grad()
def attribute_words(
    pipe, prompt: str | Sequence[str], heads: Sequence[tuple[int, int]] | None = None, **call: Any
) -> list[Attribution]:
    """Draw images as `pipe(prompt, **call)` does, each with maps of where its words were read.

    A map says which pixels asked a word while they were denoised. That is where a word was read, which need not be
    what it did: the text also enters by FiLM, at all places at once, and the tokens have read one another before. How
    far maps are right where the truth is known, see [`attribute_image`].

    Args:
        pipe (`VisBioPipeline`): or a pipeline of Diffusers with a `UNet2DConditionModel` and one text encoder; with
            LoRA adapters or without.
        prompt (`str` or `Sequence[str]`): one or several.
        heads (`Sequence[tuple[int, int]]`, *optional*): layers and heads to read, such as `HEADS["visbio-blood-28"]`;
            default is all.
        call: further arguments of the pipeline's call, such as `generator` and `guidance_scale`.

    Raises:
        ValueError: if the UNet has no cross-attention or no such head, a prompt no word, or the pipeline refuses an
            argument.

    Source: Tang et al. 2023, What the DAAM: Interpreting Stable Diffusion Using Cross Attention, section 3, without
    its thresholds.
    """
    prompts = prompt if isinstance(prompt, str) else list(prompt)
    check_texts("prompt", prompts)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    limit = max_tokens(pipe.tokenizer, pipe.text_encoder)
    words = [word_tokens(pipe.tokenizer, text, limit) for text in prompts]
    repeat = call.get("num_images_per_prompt", 1)
    with AttentionRecorder(pipe.unet, len(prompts) * repeat, heads) as recorder:
        images = pipe(prompts, **call).images
    found = recorder.token_maps(images[0].height, images[0].width)
    return [merge_words(image, words[k // repeat], found[k]) for k, image in enumerate(images)]


@torch.no_grad()
def attribute_image(
    pipe: VisBioPipeline,
    image: Image.Image,
    prompt: str,
    heads: Sequence[tuple[int, int]] | None = None,
    levels: Sequence[float] = LEVELS,
    num_noises: int = 2,
    seed: int = 0,
) -> Attribution:
    """Return maps of where in a given image the words of a prompt are read, once it is noised.

    Measured in visbio-blood-28 (7 x 7 places) by the AUC with which a map ranks the pixels of what a word names, on
    200 real test images each (train_scripts/evaluate_attribution.py; intervals in model_cards/attribution-28). Blood
    cells moved to a corner, the cell's name: 0.978 by the heads of `HEADS`, 0.713 by all; a centred Gaussian has
    0.444, the map of another image 0.490, a random other word of the prompt 0.324, a random word of all 0.452. Tiles
    with nuclei off the middle, "nucleus" or "nuclei", adapter visbio-nuclei-lora: 0.811 by `HEADS`, 0.588 by all; a
    centred Gaussian 0.288, another image 0.522, another word 0.498, a random word of all 0.605, which is above chance
    because that may be the name itself. Brightness alone has 0.840 there, as most tiles are fluorescence, and 0.991
    upside down in blood: that a map lies on the cell says what the word means to the model, not that it segments.
    Words share each place, so that others fall below chance where one is on it; the article before a cell's name
    follows the name (0.85, 16 images), as the text encoder has mixed the two.

    Args:
        pipe (`VisBioPipeline`): on its device, with LoRA adapters or without.
        image (`PIL.Image.Image`): drawn or real, of a size that the model draws.
        prompt (`str`): what it shows.
        heads (`Sequence[tuple[int, int]]`, *optional*): as of [`attribute_words`].
        levels (`Sequence[float]`): of noise, in (0, 1], timesteps as shares of the training timesteps.
        num_noises (`int`): noises at each level.
        seed (`int`): of the noises.

    Raises:
        ValueError: for another kind of pipeline, a UNet without cross-attention or such a head, a level out of range,
            a size that the model does not draw, or a prompt without a word.
    """
    if not isinstance(pipe, VisBioPipeline):
        raise ValueError(f"a {type(pipe).__name__} does not denoise pixels: given images need a VisBioPipeline")
    if not levels or not all(0 < level <= 1 for level in levels):
        raise ValueError(f"levels of noise are above 0 and at most 1, but are {tuple(levels)}")
    check_texts("prompt", prompt)
    words = word_tokens(pipe.tokenizer, prompt, max_tokens(pipe.tokenizer, pipe.text_encoder))
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    marks = [max(round(level * scheduler.config.num_train_timesteps), 1) - 1 for level in levels]
    timesteps = torch.tensor(marks).repeat_interleave(num_noises)
    mode = "RGB" if pipe.unet.config.in_channels == 3 else "L"
    clean = pipe.image_processor.preprocess(image.convert(mode))
    noise = torch.randn(len(timesteps), *clean.shape[1:], generator=torch.Generator().manual_seed(seed))
    samples = scheduler.add_noise(clean.expand_as(noise), noise, timesteps).to(pipe.device, pipe.unet.dtype)
    text = encode_prompts(pipe, [prompt]).rows([0] * len(samples))
    with AttentionRecorder(pipe.unet, len(samples), heads) as recorder:
        predict(pipe.unet, samples, timesteps.to(pipe.device), text, guidance_scale=1.0)
    return merge_words(image, words, recorder.token_maps(image.height, image.width).mean(dim=0))


def merge_words(image: Image.Image, words: list[tuple[str, list[int]]], token_maps: torch.Tensor) -> Attribution:
    """Return the shares of words from the attention to tokens, `(tokens, height, width)`."""
    maps = torch.stack([token_maps[tokens].sum(dim=0) for _, tokens in words])  # (words, H, W)
    total = maps.sum(dim=0)
    return Attribution(image, [word for word, _ in words], (maps / total).numpy(), float(total.mean()))
