"""VisBioInpaintPipeline: a part of a biological image drawn anew, in pixel space."""

from collections.abc import Callable

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from visbio_diffusers.pipelines.lora_loader import VisBioLoraLoaderMixin
from visbio_diffusers.pipelines.redraw import VisBioRedrawMixin


class VisBioInpaintPipeline(VisBioRedrawMixin, DiffusionPipeline, VisBioLoraLoaderMixin):
    """Draw a part of an image anew from a description; the other pixels remain the given ones.

    After each step the known pixels are put back with the noise of that step, as in RePaint (Lugmayr et al. 2022),
    section 4.1, but the same noise in all steps and without going back; at last themselves.

    Args:
        unet, scheduler, text_encoder, tokenizer: as of [`VisBioPipeline`], whose folders it loads; the scheduler none
            that cannot begin at an image (PNDM, LMS).

    Example:
        ```py
        >>> from PIL import Image
        >>> from visbio_diffusers import VisBioInpaintPipeline

        >>> pipe = VisBioInpaintPipeline.from_pretrained("model_cards/visbio-blood-28")
        >>> cell, mask = Image.open("cell.png"), Image.new("L", (28, 28))  # of 28 x 28 pixels
        >>> mask.paste(255, (8, 8, 20, 20))  # what is drawn; black is kept
        >>> pipe("a segmented neutrophil", cell, mask).images[0].save("neutrophil.png")
        ```
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        mask_image: PipelineImageInput = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
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
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): one for all prompts, or one for
                each; uint8, or float in [0, 1]; arrays have their channels last, tensors before height and width.
            mask_image (as `image`, of one channel): 1 (white) is drawn, 0 (black) is kept; of the size of its image.
            height, width (`int`, *optional*): of the images in pixels; others are resized. Default is the size the
                model was trained at.
            strength (`float`): share of the steps, the last ones, in [0, 1]: 1 ignores the pixels to be drawn, 0
                leaves them as they are.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): standard normal noise for
                the image, instead of drawing it.
            num_inference_steps and others: as in [`VisBioPipeline.__call__`].

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: `images`. Where the mask is 0 they are the pixels of
            `image`, bit by bit (of the resized one if it has to be resized).

        Raises:
            ValueError: for arguments that cannot work; the message names the way out.
        """
        if mask_image is None:
            raise ValueError("give `mask_image`, or use VisBioImg2ImgPipeline, which draws all of the image")
        return self._redraw(
            prompt,
            image,
            mask_image,
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
