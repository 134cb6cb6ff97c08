"""Drawing over given images: what VisBioImg2ImgPipeline and VisBioInpaintPipeline share."""

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from visbio_diffusers.pipelines.images import expand, prepare_images
from visbio_diffusers.pipelines.pipeline_mixin import VisBioPipelineMixin
from visbio_diffusers.pipelines.schedulers import last_timesteps, prepare_timesteps, step_arguments


class VisBioRedrawMixin(VisBioPipelineMixin):
    """A pipeline that starts from an image at a share of the steps, and may keep a part of it."""

    @torch.no_grad()
    def _redraw(
        self,
        prompt,
        image,
        mask_image,
        strength,
        *,
        height,
        width,
        num_inference_steps,
        timesteps,
        sigmas,
        guidance_scale,
        guidance_interval,
        guidance_rescale,
        negative_prompt,
        num_images_per_prompt,
        eta,
        generator,
        latents,
        prompt_embeds,
        negative_prompt_embeds,
        output_type,
        return_dict,
        cross_attention_kwargs,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
    ):
        """Draw with the arguments of `__call__`; without `mask_image` nothing is kept."""
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
        pixels, mask = prepare_images(image, mask_image, self.unet.config.in_channels, height, width)
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
        batch_size = prompt_embeds.shape[0]
        counts = batch_size // num_images_per_prompt, num_images_per_prompt
        pixels = expand("image", pixels, *counts).to(device)
        mask = None if mask is None else expand("mask_image", mask, *counts).to(device)

        # 3. Prepare timesteps
        timesteps = prepare_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        timesteps = last_timesteps(self.scheduler, timesteps, strength, midway=mask is not None)

        # 4. Prepare latents: noise, or the image noised to the first timestep
        noise = self._prepare_noise(batch_size, height, width, torch.float32, device, generator, latents)
        clean = 2 * pixels - 1
        if strength == 1:
            latents = noise * self.scheduler.init_noise_sigma
        else:
            latents = self.scheduler.add_noise(clean, noise, timesteps[:1]) if len(timesteps) else clean

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
            None if mask is None else self._keeper(clean, noise, mask, timesteps),
        )

        # 6. Images
        images = self._show(latents, pixels, mask, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _keeper(self, clean, noise, mask, timesteps):
        """Return what puts back the known pixels after each step, with the noise that the step has left."""

        def keep(step, latents):
            if step + 1 == len(timesteps):
                return torch.where(mask, latents, clean)
            if (step + 1) % self.scheduler.order:  # within a step of second order
                return latents
            return torch.where(mask, latents, self.scheduler.add_noise(clean, noise, timesteps[step + 1 : step + 2]))

        return keep

    def _show(self, latents, pixels, mask, output_type):
        """Return latents as images, with the given pixels themselves where the mask is False."""
        if output_type == "latent":
            return latents  # as the last callback left them
        images = self.image_processor.postprocess(latents, output_type="pt")
        images = images if mask is None else torch.where(mask, images, pixels)
        if output_type == "pt":
            return images
        images = self.image_processor.pt_to_numpy(images)
        return self.image_processor.numpy_to_pil(images) if output_type == "pil" else images
