"""What VisBioFusion's pipelines share: their parts, prompts, checks of arguments, and the denoising."""

import logging
from contextlib import nullcontext
from numbers import Real

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from visbio_diffusers.models.safetensors_mixin import SafetensorsMixin
from visbio_diffusers.text import check_texts, encode_text, max_tokens, text_mask


logger = logging.getLogger(__name__)


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
