"""VisBioImg2ImgPipeline: biological images from an image and text, in pixel space."""

from collections.abc import Callable

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers import DDIMScheduler

from visbio_diffusers.pipelines.images import expand, prepare_images
from visbio_diffusers.pipelines.lora_loader import VisBioLoraLoaderMixin
from visbio_diffusers.pipelines.redraw import VisBioRedrawMixin
from visbio_diffusers.pipelines.schedulers import prepare_timesteps


class VisBioImg2ImgPipeline(VisBioRedrawMixin, DiffusionPipeline, VisBioLoraLoaderMixin):
    """Draw an image anew from a description, as far from it as `strength` says (SDEdit, Meng et al. 2022).

    Args:
        unet, scheduler, text_encoder, tokenizer: as of [`VisBioPipeline`], whose folders it loads; the scheduler none
            that cannot begin at an image (PNDM, LMS).

    Example:
        ```py
        >>> from PIL import Image
        >>> from visbio_diffusers import VisBioImg2ImgPipeline

        >>> pipe = VisBioImg2ImgPipeline.from_pretrained("model_cards/visbio-blood-28")
        >>> cell = Image.open("cell.png").convert("RGB")
        >>> pipe("a segmented neutrophil", cell, strength=0.5).images[0].save("neutrophil.png")
        ```
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        strength: float = 0.8,
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
        height: int | None = None,
        width: int | None = None,
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
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): one for all prompts, or one for
                each; uint8, or float in [0, 1]; arrays have their channels last, tensors before height and width.
            strength (`float`): share of the steps, the last ones, in [0, 1]: 1 ignores the image, and draws what
                `VisBioPipeline` does from the same noise; 0 returns it as it is.
            height, width (`int`, *optional*): of the images in pixels; others are resized. Default is the size the
                model was trained at.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): standard normal noise for
                the image, instead of drawing it.
            num_inference_steps and others: as in [`VisBioPipeline.__call__`].

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: `images`.

        Raises:
            ValueError: for arguments that cannot work; the message names the way out.
        """
        return self._redraw(
            prompt,
            image,
            None,
            strength,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

    @torch.no_grad()
    def invert(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        num_iterations: int = 3,
    ):
        """Return noise from which `VisBioPipeline` draws `image` again, nearly, with the same arguments and DDIM.

        Drawn from it with another prompt, the image is edited. Each DDIM step is solved for what it started from, by
        fixed-point iteration (Pan et al. 2023, arXiv:2309.04907, section 3.1): plain DDIM inversion cannot cross the
        first timestep where that is pure noise.

        Args:
            image, prompt and others: as in `__call__`, one prompt for each image.
            num_iterations (`int`): predictions for each step; with 1 it is plain DDIM inversion.

        Returns:
            `torch.Tensor` of shape `(batch, channels, height, width)`, for `latents` of `VisBioPipeline`.

        Raises:
            ValueError: if the scheduler is not DDIM without clipping, or for arguments that cannot work.
        """
        config = self.scheduler.config
        if not isinstance(self.scheduler, DDIMScheduler) or config.clip_sample or config.thresholding:
            raise ValueError(
                "only DDIM without clipping can be inverted: use DDIMScheduler.from_config(pipe.scheduler.config,"
                " clip_sample=False, thresholding=False)"
            )
        if not isinstance(num_iterations, int) or num_iterations < 1:
            raise ValueError(f"`num_iterations` must be a whole number from 1, but is {num_iterations!r}")
        height = height or self.unet.config.sample_size
        width = width or self.unet.config.sample_size
        num_inference_steps, guidance_scale = self._or_defaults(num_inference_steps, guidance_scale)
        self._check_form(height, width, 1, guidance_scale, (0, 1), "latent")
        self.check_inputs(prompt, height, width, negative_prompt, prompt_embeds, negative_prompt_embeds)
        pixels, _ = prepare_images(image, None, self.unet.config.in_channels, height, width)
        self._set_guidance(guidance_scale, 0.0, cross_attention_kwargs)
        device, guided = self._execution_device, self.do_classifier_free_guidance
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt, device, 1, guided, negative_prompt, prompt_embeds, negative_prompt_embeds
        )
        embeds = torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds
        timesteps = prepare_timesteps(self.scheduler, num_inference_steps, device)
        latents = 2 * expand("image", pixels, len(prompt_embeds), 1).to(device) - 1
        text_cache = {}
        for t in self.progress_bar(timesteps.flip(0)):
            # a step is linear: of_sample * sample + of_prediction * prediction
            of_sample, of_prediction = self.scheduler.step(
                torch.tensor([0.0, 1.0], device=device), t, torch.tensor([1.0, 0.0], device=device)
            ).prev_sample
            before = latents
            for _ in range(num_iterations):
                prediction = self._predict(before, t, embeds, guided, text_cache)
                before = (latents - of_prediction * prediction) / of_sample
            latents = before
        self.maybe_free_model_hooks()
        return latents / self.scheduler.init_noise_sigma
