"""VisBioPipeline of visbio_diffusers 0.1.0.dev0, for people who have not installed it.

Made by the package from its own sources; change those instead. Apache-2.0.

visbio_diffusers/models/safetensors_mixin.py
visbio_diffusers/pipelines/lora_loader.py
visbio_diffusers/pipelines/pipeline_mixin.py
visbio_diffusers/pipelines/pipeline_visbio.py
visbio_diffusers/pipelines/schedulers.py
visbio_diffusers/text.py
"""

import inspect
import logging
import numpy as np
import torch
import torch.nn.functional as F
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import nullcontext
from diffusers import UniPCMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from numbers import Real
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase


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


def max_tokens(tokenizer, text_encoder) -> int:
    """Return how many tokens of a text, special ones included, the encoder takes."""
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


@torch.no_grad()
def encode_text(text_encoder, tokenizer, texts: Sequence[str], device=None) -> torch.Tensor:
    """Return the last hidden states of `texts`, with rows of zeros as padding.

    Args:
        text_encoder (`transformers.BertModel`): or any encoder that returns `last_hidden_state`.
        tokenizer (`transformers.PreTrainedTokenizerBase`): the encoder's own.
        texts (`Sequence[str]`): longer ones are cut to what the encoder takes.
        device (`torch.device`, *optional*): where the encoder runs; by default where it is.

    Returns:
        `torch.Tensor` of shape `(len(texts), tokens, hidden_size)` in the encoder's dtype; `tokens` is that of the
        longest text. A row of zeros is padding (`text_mask` finds it).
    """
    inputs = tokenizer(
        list(texts),
        padding="longest",
        truncation=True,
        max_length=max_tokens(tokenizer, text_encoder),
        return_tensors="pt",
    )
    inputs = {name: inputs[name].to(device or text_encoder.device) for name in ("input_ids", "attention_mask")}
    hidden_states = text_encoder(**inputs).last_hidden_state
    return hidden_states * inputs["attention_mask"].unsqueeze(-1).to(hidden_states.dtype)


def check_texts(name, texts, allow_empty=False):
    """Raise a ValueError unless `texts` is a text or a non-empty list of texts that say something."""
    if not isinstance(texts, (str, list)) or not all(isinstance(text, str) for text in texts):
        kind = type(texts).__name__
        if isinstance(texts, list):
            kind = f"a list with {next(type(text).__name__ for text in texts if not isinstance(text, str))}"
        raise ValueError(f"`{name}` must be a text or a list of texts, but is {kind}")
    texts = [texts] if isinstance(texts, str) else texts
    if not texts:
        raise ValueError(f"`{name}` is an empty list: give at least one text")
    if not allow_empty and not all(text.strip() for text in texts):
        raise ValueError(
            f"`{name}` is empty: describe the image, or draw without text by prompt_embeds=pipe.encode_prompt('')[0]"
        )


logger = logging.getLogger(__name__)


def text_mask(prompt_embeds: torch.Tensor) -> torch.Tensor:
    """Return a bool mask (batch, tokens) of `prompt_embeds` (batch, tokens, width): False where a row is all zeros."""
    return (prompt_embeds != 0).any(dim=-1)


class VisBioPipelineMixin(SafetensorsMixin):
    """Parts, properties and steps of a pipeline in pixel space; stands before `DiffusionPipeline` among the bases."""

    model_cpu_offload_seq = "text_encoder->unet"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.35,
        timestep_spacing: str | None = None,
    ):
        super().__init__()
        self.register_to_config(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, timestep_spacing=timestep_spacing
        )
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._guidance_scale = 1.0
        self._guidance_rescale = 0.0
        self._cross_attention_kwargs = None
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep = None

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Make a pipeline of this class from the parts of another, which they share; arguments as in Diffusers."""
        return super().from_pipe(pipeline, **{"unet": pipeline.unet, **kwargs})  # a type that Diffusers does not know

    @property
    def guidance_scale(self):
        """Weight of the text: w of Imagen, equation 2; 1 is off."""
        return self._guidance_scale

    @property
    def guidance_rescale(self):
        """Share of the guided prediction that is rescaled to the spread of the unguided one."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self):
        """Whether each step also predicts with the negative prompt."""
        return self._guidance_scale > 1

    @property
    def cross_attention_kwargs(self):
        """Keyword arguments for the UNet, such as `{"scale": 0.5}` for the strength of LoRA adapters."""
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self):
        """Number of denoising steps of the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self):
        """Timestep of the step being computed, None between calls; Diffusers' caches ask for it."""
        return self._current_timestep

    @property
    def interrupt(self):
        """Set `pipe._interrupt = True` from a callback to end the denoising."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ):
        """Encode prompts, once each, into tensors that `__call__` takes as `prompt_embeds`.

        Args:
            prompt (`str` or `list[str]`, *optional*): left out if `prompt_embeds` is given.
            device (`torch.device`, *optional*): where to encode; default is the pipeline's execution device.
            num_images_per_prompt (`int`): each row is repeated so often.
            do_classifier_free_guidance (`bool`): whether negative embeddings are wanted.
            negative_prompt (`str` or `list[str]`, *optional*): default is the empty text.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(batch, tokens, width)`, *optional*):
                already encoded; rows of zeros are padding.

        Returns:
            `prompt_embeds` of shape `(batch * num_images_per_prompt, tokens, width)` and `negative_prompt_embeds` of
            the same shape, or None without guidance.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds = self._encode(prompt, device)
        batch_size = prompt_embeds.shape[0]
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt = negative_prompt or ""
            negative = [negative_prompt] * batch_size if isinstance(negative_prompt, str) else negative_prompt
            negative_prompt_embeds = self._encode(negative, device)

        dtype = self.unet.dtype if self.unet is not None else prompt_embeds.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
            tokens = max(prompt_embeds.shape[1], negative_prompt_embeds.shape[1])
            prompt_embeds = F.pad(prompt_embeds, (0, 0, 0, tokens - prompt_embeds.shape[1]))
            negative_prompt_embeds = F.pad(negative_prompt_embeds, (0, 0, 0, tokens - negative_prompt_embeds.shape[1]))
        return prompt_embeds, negative_prompt_embeds

    def _encode(self, prompts, device):
        """Return the hidden states of a list of texts; say which part of one the text encoder will not see."""
        if self.text_encoder is None:
            raise ValueError("no text encoder is loaded: give `prompt_embeds` (and `negative_prompt_embeds` to guide)")
        limit = max_tokens(self.tokenizer, self.text_encoder)
        kept = limit - self.tokenizer.num_special_tokens_to_add()
        for text in dict.fromkeys(prompts):
            if len(text) <= kept:  # a token has at least one character
                continue
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > kept:
                logger.warning(
                    f"the text encoder takes {limit} tokens; this end of the prompt is cut off: "
                    f"{self.tokenizer.decode(ids[kept:]).removeprefix('##')!r}"
                )
        return encode_text(self.text_encoder, self.tokenizer, prompts, device)

    def check_inputs(
        self,
        prompt,
        height,
        width,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        callback_on_step_end_tensor_inputs=None,
    ):
        """Raise a ValueError with the way out for arguments of `__call__` that cannot work."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either `prompt` or `prompt_embeds`: one of them, not both")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give either `negative_prompt` or `negative_prompt_embeds`, not both")
        if prompt is not None:
            check_texts("prompt", prompt)
        if negative_prompt is not None:
            check_texts("negative_prompt", negative_prompt, allow_empty=True)
        batch_size = len(prompt) if isinstance(prompt, list) else 1
        batch_size = batch_size if prompt_embeds is None else len(prompt_embeds)
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
            raise ValueError(
                f"{len(negative_prompt)} entries in `negative_prompt` for {batch_size} prompts: give one each"
            )
        self._check_embeds(prompt_embeds, negative_prompt_embeds, batch_size)
        factor = 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height < factor or width < factor or height % factor or width % factor:
            raise ValueError(f"`height` and `width` must be multiples of {factor}, but are {height} and {width}")
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, not {sorted(unknown)}"
            )

    def _check_form(self, height, width, num_images_per_prompt, guidance_scale, guidance_interval, output_type):
        sizes = {"height": height, "width": width, "num_images_per_prompt": num_images_per_prompt}
        for name, value in {**sizes, "guidance_scale": guidance_scale}.items():
            if not isinstance(value, Real) or (name in sizes and value != int(value)):
                kind = "a whole number" if name in sizes else "a number"
                raise ValueError(f"`{name}` must be {kind}, but is {value!r}")
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1, but is {num_images_per_prompt}")
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(f"`guidance_interval` must be (low, high) within [0, 1], but is {guidance_interval}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be pil, np, pt or latent, but is {output_type!r}")

    def _check_embeds(self, prompt_embeds, negative_prompt_embeds, batch_size):
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is None:
                continue
            if embeds.ndim != 3 or embeds.shape[-1] != self.unet.config.cross_attention_dim:
                raise ValueError(
                    f"`{name}` must have shape (batch, tokens, {self.unet.config.cross_attention_dim}), as"
                    f" `encode_prompt` gives it, but has {tuple(embeds.shape)}"
                )
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) != batch_size:
            raise ValueError(
                f"{len(negative_prompt_embeds)} `negative_prompt_embeds` for {batch_size} prompts: give one each"
            )

    def _or_defaults(self, num_inference_steps, guidance_scale):
        """Return steps and guidance, and for None those with which the model is best drawn."""
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        return steps, self.config.guidance_scale if guidance_scale is None else guidance_scale

    def prepare_latents(self, batch_size, height, width, dtype, device, generator, latents=None):
        """Return the noise to start from: given, or drawn (batch, channels, height, width) at the scheduler's scale.

        Raises:
            ValueError: if a list of generators has not one for each image, or `latents` has another shape.
        """
        noise = self._prepare_noise(batch_size, height, width, dtype, device, generator, latents)
        return noise * self.scheduler.init_noise_sigma

    def _prepare_noise(self, batch_size, height, width, dtype, device, generator, latents=None):
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"got {len(generator)} generators for {batch_size} images: give one, or one for each")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, but has {tuple(latents.shape)}")
        return latents.to(device, dtype)

    def _set_guidance(self, guidance_scale, guidance_rescale, cross_attention_kwargs):
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

    def _denoise(
        self,
        latents,
        timesteps,
        prompt_embeds,
        negative_prompt_embeds,
        guidance_interval,
        step_kwargs,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=(),
        after_step=None,
    ):
        """Return the latents after the steps; `after_step(step, latents)` may replace them before the callback."""
        self._num_timesteps = len(timesteps)
        low, high = (bound * self.scheduler.config.num_train_timesteps for bound in guidance_interval)
        guided_steps = [self.do_classifier_free_guidance and low <= t <= high for t in timesteps.tolist()]
        text_caches = {}  # keys and values of the text are computed once
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, (t, guided) in enumerate(zip(timesteps, guided_steps)):
                if self.interrupt:
                    continue
                self._current_timestep = t
                embeds = torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds
                noise_pred = self._predict(latents, t, embeds, guided, text_caches.setdefault(guided, {}))
                latents = self.scheduler.step(noise_pred, t, latents, **step_kwargs, return_dict=False)[0]
                if after_step is not None:
                    latents = after_step(i, latents)

                if callback_on_step_end is not None:
                    tensors = dict(zip(self._callback_tensor_inputs, (latents, prompt_embeds, negative_prompt_embeds)))
                    wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    adapted = bool(getattr(self.unet, "peft_config", None))  # whose weights it may change
                    changed = callback_on_step_end(self, i, t, wanted)
                    if adapted or getattr(self.unet, "peft_config", None) or set(changed) - {"latents"}:
                        text_caches = {}
                    latents = changed.pop("latents", latents)
                    prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = changed.pop("negative_prompt_embeds", negative_prompt_embeds)
                progress_bar.update()
        self._current_timestep = None
        return latents

    def _predict(self, latents, t, embeds, guided, text_cache):
        """Return the prediction (batch, ...) in float32, guided where `embeds` holds negative and positive ones."""
        sample = torch.cat([latents] * 2) if guided else latents
        cached = hasattr(self.unet, "cache_context")  # VisBioUNet; Diffusers' own UNets take no text_cache
        with self.unet.cache_context("guided" if guided else "unguided") if cached else nullcontext():
            noise_pred = self.unet(
                self.scheduler.scale_model_input(sample, t).to(embeds.dtype),
                t,
                encoder_hidden_states=embeds,
                encoder_attention_mask=text_mask(embeds),
                cross_attention_kwargs=self.cross_attention_kwargs,
                **({"text_cache": text_cache} if cached else {}),
                return_dict=False,
            )[0].float()
        return self._guide(noise_pred) if guided else noise_pred

    def _guide(self, noise_pred):
        """Combine the predictions without and with text, (2 batch, ...), to the guided one, (batch, ...)."""
        noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
        guided = torch.lerp(noise_pred_uncond, noise_pred_text, self.guidance_scale)
        if self.guidance_rescale > 0:
            dims = list(range(1, guided.ndim))
            ratio = noise_pred_text.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
            guided = guided * torch.lerp(torch.ones_like(ratio), ratio, self.guidance_rescale)
        return guided


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


# Their steps pile up at the terminal timestep, where the noise level of a cosine schedule runs away.
UNFIT_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")


# These recover the spread of Gaussian data from its best denoiser (tests/test_pipeline_visbio.py).
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)


def check_scheduler(scheduler) -> None:
    """Raise a ValueError with the way out unless the scheduler, as it is set, can sample this kind of model."""
    config, name = scheduler.config, type(scheduler).__name__
    prediction_type = config.get("prediction_type")
    known = any(base.__name__ in SCHEDULERS for base in type(scheduler).__mro__)
    if not known or prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"{name} with prediction_type {prediction_type!r} is for another kind of model: use"
            f" {', '.join(SCHEDULERS[:4])} or {SCHEDULERS[4]}"
        )
    taken = inspect.signature(type(scheduler).__init__).parameters
    for spacing in UNFIT_SPACINGS:
        if spacing in taken and config[spacing]:
            raise ValueError(
                f"{name} with {spacing} spends its steps where there is nothing but noise: create it with"
                f" {name}.from_config(pipe.scheduler.config, {spacing}=False)"
            )
    if prediction_type == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "a model that predicts noise (prediction_type 'epsilon') sees no image at zero terminal SNR: create the"
            f" scheduler with {name}.from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)"
        )


MAX_INIT_SIGMA = 5000.0  # Euler at zero terminal SNR starts at 4096; second-order steps from 20,000 go astray


COSINE_SPACED = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # with which it was measured


def _set_unipc_timesteps(scheduler, timesteps: list[int], device: torch.device | None) -> None:
    """Set what UniPC in Diffusers 0.42 takes from the number of steps alone."""
    scheduler.set_timesteps(len(timesteps), device=device)
    scheduler.timesteps = torch.tensor(timesteps, device=device)
    alphas = scheduler.alphas_cumprod[timesteps].double().cpu()
    sigmas = torch.sqrt((1 - alphas) / alphas).float()
    scheduler.sigmas = torch.cat([sigmas, scheduler.sigmas[-1:]])


def _takes(scheduler, argument: str) -> bool:
    """Return whether steps can be set by `timesteps` or `sigmas`."""
    if isinstance(scheduler, UniPCMultistepScheduler):
        return argument == "timesteps"  # its own `sigmas` are for flow matching
    return argument in inspect.signature(scheduler.set_timesteps).parameters


COSINE_POWER = 3.5  # more crowds the steps more at the noisy end; 2 treats both ends alike


def cosine_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Return timesteps that lie closest where there is nearly nothing but noise, and closer where there is little.

    The i-th of n is (T - 1) (1 - cos(pi / 2 (1 - i / n))^3.5), or the next that is not taken yet. Twelve such steps of
    UniPC come nearer to real images than twelve even ones (model_cards/EXPERIMENTS.md).

    Raises:
        ValueError: for more steps than there are timesteps.
    """
    if num_inference_steps > num_train_timesteps:
        raise ValueError(f"`num_inference_steps` must be at most {num_train_timesteps}, but is {num_inference_steps}")
    shares = np.arange(num_inference_steps, 0, -1) / num_inference_steps
    shares = 1 - np.cos(np.pi / 2 * shares) ** COSINE_POWER
    timesteps = ((num_train_timesteps - 1) * shares).round().astype(int).tolist()
    for i in range(1, num_inference_steps):
        timesteps[i] = max(min(timesteps[i], timesteps[i - 1] - 1), num_inference_steps - 1 - i)
    return timesteps


def prepare_timesteps(
    scheduler,
    num_inference_steps: int,
    device: torch.device | None = None,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
    spacing: str | None = None,
) -> torch.Tensor:
    """Set the steps of a scheduler that can sample this kind of model.

    Args:
        scheduler ([`SchedulerMixin`]): one of `SCHEDULERS`.
        num_inference_steps (`int`): spread as `spacing` says.
        device (`torch.device`, *optional*): of the result.
        timesteps (`list[int]`, *optional*), sigmas (`list[float]`, *optional*): instead, one or the other, in
            descending order, where the scheduler takes them.
        spacing (`str`, *optional*): "cosine" for [`cosine_timesteps`] with a scheduler of `COSINE_SPACED`; otherwise
            steps are even, as the scheduler is set to.

    Returns:
        `scheduler.timesteps`, descending.

    Raises:
        ValueError: if the scheduler does not take custom steps, or cannot sample this kind of model as it is set; for
            another spacing.
    """
    check_scheduler(scheduler)
    name = type(scheduler).__name__
    if timesteps is not None and sigmas is not None:
        raise ValueError("give either `timesteps` or `sigmas`, not both")
    custom = {"timesteps": timesteps, "sigmas": sigmas}
    custom = {argument: values for argument, values in custom.items() if values is not None}
    if not custom and (not isinstance(num_inference_steps, int) or num_inference_steps < 1):
        raise ValueError(f"`num_inference_steps` must be a whole number from 1, but is {num_inference_steps!r}")
    for argument in custom:
        if not _takes(scheduler, argument):
            raise ValueError(f"{name} takes no custom `{argument}`: use num_inference_steps")
    if spacing not in (None, "cosine"):
        raise ValueError(f'the timestep spacing of a pipeline is "cosine" or None, but is {spacing!r}')
    if spacing and not custom and name in COSINE_SPACED:
        custom = {"timesteps": cosine_timesteps(num_inference_steps, scheduler.config.num_train_timesteps)}
    if "timesteps" in custom and isinstance(scheduler, UniPCMultistepScheduler):
        _set_unipc_timesteps(scheduler, custom["timesteps"], device)
    else:
        scheduler.set_timesteps(**(custom or {"num_inference_steps": num_inference_steps}), device=device)
    sigma = float(scheduler.init_noise_sigma)
    if sigma > MAX_INIT_SIGMA:
        raise ValueError(
            f"{name} would start at noise level {sigma:.0f}, where it goes astray: create it with"
            f' {name}.from_config(pipe.scheduler.config, timestep_spacing="leading")'
        )
    return scheduler.timesteps


# In the first step from zero terminal SNR DDIM takes the root of 1 - eta^2, times a positive number, that rounding can
# bring below 0 at eta 1, depending on the processor: all pixels would be NaN.
MAX_ETA = 1 - 1e-6


def step_arguments(scheduler, eta: float, generator) -> dict:
    """Return those of the DDIM noise share `eta` (at most a millionth below 1) and `generator` that `step` takes."""
    takes = inspect.signature(scheduler.step).parameters
    given = {"eta": min(eta, MAX_ETA), "generator": generator}
    return {name: value for name, value in given.items() if name in takes}


class VisBioPipeline(VisBioPipelineMixin, DiffusionPipeline, VisBioLoraLoaderMixin):
    """Draw biological images from descriptions.

    Args:
        unet ([`VisBioUNet`] or `UNet2DConditionModel`): denoises pixels; no VAE, "latents" are images in [-1, 1].
        scheduler ([`SchedulerMixin`]): DDIM, DDPM, DPMSolverMultistep, UniPC or Euler.
        text_encoder ([`~transformers.PreTrainedModel`]): any BERT whose hidden size is `unet`'s `cross_attention_dim`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): that encoder's tokenizer.
        num_inference_steps (`int`), guidance_scale (`float`): those of calls that name none.
        timestep_spacing (`str`, *optional*): how steps are spread, see [`prepare_timesteps`].

    Example:
        ```py
        >>> from visbio_diffusers import VisBioPipeline

        >>> pipe = VisBioPipeline.from_pretrained("model_cards/visbio-blood-28")
        >>> pipe("a segmented neutrophil, Wright-Giemsa stain").images[0].save("neutrophil.png")
        ```
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  Diffusers' signature
    ):
        """Draw images.

        Args:
            prompt (`str` or `list[str]`, *optional*): what to draw; left out if `prompt_embeds` is given.
            height, width (`int`, *optional*): in pixels, multiples of the UNet's `downsample_factor`; default is the
                size the model was trained at.
            num_inference_steps (`int`, *optional*): denoising steps; default is that of the model.
            timesteps (`list[int]`, *optional*), sigmas (`list[float]`, *optional*): custom steps, in descending
                order, for schedulers that take them.
            guidance_scale (`float`, *optional*): weight of the text, w of equation 2 of Imagen (Saharia et al.
                2022); default is that of the model. 1 is off; higher follows the text more closely and varies less.
            guidance_interval (`tuple[float, float]`): guidance works only while the timestep, as a share of the
                training timesteps, lies within (Kynkaanniemi et al. 2024). Steps outside cost half. (0, 1) guides all.
            guidance_rescale (`float`): in [0, 1], against overexposure (Lin et al. 2023, section 3.4).
            negative_prompt (`str` or `list[str]`, *optional*): what to steer away from; default is the empty text.
            num_images_per_prompt (`int`): images for each prompt.
            eta (`float`): DDIM noise share, 0 = ODE, 1 = DDPM; other schedulers ignore it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): source of the noise, one for all or
                one for each image, so that an image can be drawn again.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): standard normal noise to
                start from (pixels: there is no VAE).
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(batch, tokens, width)`, *optional*): from
                `encode_prompt`; rows of zeros are padding.
            output_type (`str`): "pil", "np" (float (batch, height, width, channels) in [0, 1]), "pt" (the same,
                channels second) or "latent" (float in [-1, 1], not clipped).
            return_dict (`bool`): whether to return an `ImagePipelineOutput` or a tuple.
            cross_attention_kwargs (`dict`, *optional*): `{"scale": float}` scales LoRA adapters.
            callback_on_step_end (`Callable`, *optional*): called as `f(pipe, step, timestep, tensors)` after each
                step; what it returns replaces the tensors.
            callback_on_step_end_tensor_inputs (`list[str]`): the tensors it is given.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: `images`.

        Raises:
            ValueError: for arguments that cannot work; the message names the way out.
        """
        # 0. Defaults
        height = height or self.unet.config.sample_size
        width = width or self.unet.config.sample_size
        num_inference_steps, guidance_scale = self._or_defaults(num_inference_steps, guidance_scale)

        # 1. Check inputs
        self._check_form(height, width, num_images_per_prompt, guidance_scale, guidance_interval, output_type)
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            callback_on_step_end_tensor_inputs,
        )
        self._set_guidance(guidance_scale, guidance_rescale, cross_attention_kwargs)
        device = self._execution_device

        # 2. Encode prompts
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
        )

        # 3. Prepare timesteps
        spacing = self.config.timestep_spacing
        timesteps = prepare_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas, spacing)

        # 4. Prepare latents: noise in pixel space, always float32, for multistep schedulers add up rounding errors
        latents = self.prepare_latents(
            prompt_embeds.shape[0], height, width, torch.float32, device, generator, latents
        )

        # 5. Denoise
        latents = self._denoise(
            latents,
            timesteps,
            prompt_embeds,
            negative_prompt_embeds,
            guidance_interval,
            step_arguments(self.scheduler, eta, generator),
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        # 6. Images
        image = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
