"""VisBioRestorationPipeline: micrographs without their noise, or at a higher resolution, in pixel space."""

from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import DPMSolverMultistepScheduler

from visbio_diffusers.pipelines.images import expand, read_images
from visbio_diffusers.pipelines.lora_loader import VisBioLoraLoaderMixin
from visbio_diffusers.pipelines.pipeline_mixin import VisBioPipelineMixin
from visbio_diffusers.pipelines.schedulers import check_scheduler, prepare_timesteps


PROJECTIONS = 100  # onto the given pixels and onto [0, 1], in turn


class VisBioRestorationPipeline(VisBioPipelineMixin, DiffusionPipeline, VisBioLoraLoaderMixin):
    """Draw what an image may have been before it was reduced and noised: samples of the posterior.

    The image is taken for y = A x + n: x the image that is wanted, A the mean over `factor` x `factor` pixels (for 1,
    A changes nothing), n independent Gaussian noise. Samples go from noise to x by SDE-DPM-Solver++. In each step with
    at least the noise of y, what y tells of the sample is y, with the noise that it lacks there; the rest of the
    sample, and all steps after that, are the model's. So

    - without `factor` sampling begins at y, in the step of its noise. Its samples are those of the posterior, as far
      as the model knows its images (Kawar et al. 2021, arXiv:2101.09552); one step gives its mean, which is the best
      guess in squared error;
    - with `factor` this is the null-space correction of DDNM (Wang et al. 2023, arXiv:2212.00490, equation 13), on
      noised samples, as ILVR has it (Choi et al. 2021). What y tells reaches the rest through noise, so that this is
      near the posterior, and the posterior itself where the rest is independent of y.

    Args:
        unet, text_encoder, tokenizer: as of [`VisBioPipeline`], whose folders it loads.
        scheduler: of any kind that samples such a model; a SDE-DPM-Solver++ of its noise schedule takes its place.

    Example:
        ```py
        >>> from PIL import Image
        >>> from visbio_diffusers import VisBioRestorationPipeline

        >>> pipe = VisBioRestorationPipeline.from_pretrained("model_cards/visbio-blood-28")
        >>> small = Image.open("cell.png").convert("RGB")  # of 14 x 14 pixels
        >>> pipe(image=small, factor=2).images[0].save("larger.png")  # of 28 x 28
        ```
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        factor: int = 1,
        noise_std: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
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
        """Restore images.

        Args:
            prompt (`str` or `list[str]`, *optional*): what the images show; without it, and without `prompt_embeds`,
                the model goes by the image alone.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): one for all prompts, or one for
                each; uint8, or float in [0, 1]; arrays have their channels last, tensors before height and width.
            factor (`int`): how many times larger the result is in height and width; its mean over squares of so many
                pixels is `image`.
            noise_std (`float`): standard deviation of the noise in `image`, from 0 to 1, where white is 1.
            height, width (`int`, *optional*): of the result in pixels; the given images are `factor` times smaller.
                Default is the size the model was trained at.
            num_inference_steps (`int`): denoising steps; one more, at the noise of the image, if it is enlarged, and
                less if its noise is less than that of so many timesteps.
            guidance_scale (`float`): weight of the text; 1 samples the posterior, more follows the text more closely.
            num_images_per_prompt (`int`): samples for each image.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): standard normal noise to
                start from.
            negative_prompt and others: as in [`VisBioPipeline.__call__`].

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: `images`. If `noise_std` is 0 their mean over squares is
            `image`: to rounding in float, within half a grey level in "pil".

        Raises:
            ValueError: for arguments that cannot work; the message names the way out.
        """
        # 0. Defaults
        height = height or self.unet.config.sample_size
        width = width or self.unet.config.sample_size
        device = self._execution_device

        # 1. Check inputs
        self._check_form(height, width, num_images_per_prompt, guidance_scale, guidance_interval, output_type)
        _check_degradation(factor, noise_std, height, width)
        pixels = _read_given(image, self.unet.config.in_channels, factor, height, width)
        if prompt is None and prompt_embeds is None:
            guidance_scale = 1.0  # by which text?
            prompt_embeds = self.encode_prompt("", device, len(pixels), False)[0]
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
        given = expand("image", pixels, batch_size // num_images_per_prompt, num_images_per_prompt).to(device)

        # 3. Prepare timesteps, from the noise of the image on
        timesteps = self._prepare_steps(num_inference_steps, factor, noise_std, device)

        # 4. Prepare latents
        noise = self._prepare_noise(batch_size, height, width, torch.float32, device, generator, latents)
        keep = self._keeper(given, noise, factor, noise_std)

        # 5. Denoise
        latents = self._denoise(
            keep(-1, noise),
            timesteps,
            prompt_embeds,
            negative_prompt_embeds,
            guidance_interval,
            {"generator": generator},
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            keep,
        )

        # 6. Images
        images = self._show(latents, given, factor, noise_std, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _prepare_steps(self, num_inference_steps, factor, noise_std, device):
        """Set the solver to steps from the noise of the image to none; if it is enlarged, from all noise to none."""
        check_scheduler(self.scheduler)
        self.scheduler = DPMSolverMultistepScheduler.from_config(
            self.scheduler.config,
            algorithm_type="sde-dpmsolver++",
            solver_order=2,
            final_sigmas_type="zero",
            thresholding=False,
        )
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be a whole number from 1, but is {num_inference_steps!r}")
        sigmas = ((1 - self.scheduler.alphas_cumprod) / self.scheduler.alphas_cumprod).sqrt()
        last = len(sigmas) - 1
        level = min(last, int((sigmas < _known_noise(factor, noise_std)).sum()))
        first = level if factor == 1 else last
        shares = torch.arange(num_inference_steps, 0, -1) / num_inference_steps
        timesteps = set(((first + 1) * shares).round().int().clamp(min=1).sub(1).tolist())
        timesteps |= {level} if noise_std else set()
        timesteps = sorted(timesteps, reverse=True)
        return prepare_timesteps(self.scheduler, num_inference_steps, device, timesteps)

    def _keeper(self, given, noise, factor, noise_std):
        """Return what gives samples the part that is known, with the noise that their step has left."""
        known_noise = _known_noise(factor, noise_std)
        enlarged = _enlarge(2 * given - 1, factor)
        sigmas = self.scheduler.sigmas.tolist()

        def keep(step, latents):
            sigma = sigmas[step + 1]
            lacking = sigma**2 - known_noise**2
            if lacking < -1e-6 * known_noise**2:  # more than rounding
                return latents
            known = (enlarged + max(lacking, 0) ** 0.5 * noise) / (1 + sigma**2) ** 0.5
            return latents + _enlarge(_reduce(known - latents, factor), factor)

        return keep

    def _show(self, latents, given, factor, noise_std, output_type):
        """Return latents as images, which have the given pixels as their means if these have no noise."""
        if output_type == "latent":
            return latents
        images = self.image_processor.postprocess(latents, output_type="pt")
        for _ in range(PROJECTIONS if noise_std == 0 else 0):
            images = (images + _enlarge(given - _reduce(images, factor), factor)).clamp(0, 1)
        if output_type == "pt":
            return images
        images = self.image_processor.pt_to_numpy(images)
        return self.image_processor.numpy_to_pil(images) if output_type == "pil" else images


def _known_noise(factor, noise_std):
    """Return the noise of the given image in [-1, 1], on the scale of the noise of samples, of whose it is a mean."""
    return 2 * noise_std * factor


def _reduce(images, factor):
    return F.avg_pool2d(images, factor)


def _enlarge(images, factor):
    """Return the pseudo-inverse of `_reduce`."""
    return images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


def _check_degradation(factor, noise_std, height, width):
    if not isinstance(factor, int) or factor < 1 or height % factor or width % factor:
        raise ValueError(f"`factor` must be a whole number that divides {height} and {width}, but is {factor!r}")
    if not isinstance(noise_std, Real) or not 0 <= noise_std <= 1:
        raise ValueError(f"`noise_std` must be from 0 to 1, where white is 1, but is {noise_std!r}")
    if factor == 1 and noise_std == 0:
        raise ValueError("there is nothing to restore: give the image's `noise_std`, or a `factor` of at least 2")


def _read_given(image, channels, factor, height, width):
    """Return (batch, channels, height / factor, width / factor) in [0, 1]; resizing would change the noise."""
    images, wanted = read_images("image", image, channels), (height // factor, width // factor)
    for each in images:
        if each.shape[-2:] != wanted:
            raise ValueError(
                f"`image` is {each.shape[-2]} x {each.shape[-1]} pixels, but for a result of {height} x {width} by"
                f" `factor` {factor} it must be {wanted[0]} x {wanted[1]}: resize it, or give `height` and `width`"
            )
    return torch.cat(images)
