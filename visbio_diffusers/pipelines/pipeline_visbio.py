"""VisBioPipeline: biological images from text, in pixel space."""

from collections.abc import Callable

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from visbio_diffusers.pipelines.lora_loader import VisBioLoraLoaderMixin
from visbio_diffusers.pipelines.pipeline_mixin import VisBioPipelineMixin
from visbio_diffusers.pipelines.schedulers import prepare_timesteps, step_arguments


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
