"""Losses: tensors in, scalar out."""

import torch
import torch.nn.functional as F


def stratified_timesteps(batch_size, num_train_timesteps, device=None):
    """Return `batch_size` random timesteps (batch,), one in each equal part of the schedule, in random order.

    Each alone is uniform on `0 .. num_train_timesteps - 1`; together they vary less (Kingma et al. 2021, Variational
    Diffusion Models, appendix I.1).
    """
    strata = torch.arange(batch_size, device=device) + torch.rand(batch_size, device=device)
    timesteps = (strata * (num_train_timesteps / batch_size)).long().clamp(max=num_train_timesteps - 1)
    return timesteps[torch.randperm(batch_size, device=device)]


def snr_weights(alphas_cumprod, snr_gamma, prediction_type="v_prediction", floor=0.1):
    """Return the weight of the loss at each timestep: min-SNR with a floor.

    For v-prediction, min(SNR, gamma) / (SNR + 1) falls to 0 at the terminal step of a zero-terminal-SNR schedule,
    which would leave the first sampling step untrained; the floor keeps it. For the clean image the weight is
    min(SNR, gamma), for the noise min(SNR, gamma) / SNR.

    Args:
        alphas_cumprod (`torch.Tensor` of shape `(num_train_timesteps,)`): of the scheduler.
        snr_gamma (`float`): 0 gives every timestep weight 1.
        prediction_type (`str`): of the scheduler: v_prediction, epsilon or sample.
        floor (`float`): smallest weight.

    Returns:
        `torch.Tensor` of the shape of `alphas_cumprod`.

    Source: Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting Strategy, section 3.4.
    """
    if snr_gamma == 0:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    divisor = {"v_prediction": snr + 1, "epsilon": snr, "sample": torch.ones_like(snr)}[prediction_type]
    return (snr.clamp(max=snr_gamma) / divisor).clamp(min=floor)


def denoising_errors(model, scheduler, pixel_values, noise, timesteps, encoder_hidden_states, encoder_attention_mask):
    """Return the mean squared error of the model's prediction for each noised image, `(batch,)` float32.

    Args:
        model: called as `VisBioUNet.forward`, or as `UNet2DConditionModel.forward`.
        scheduler (`DDPMScheduler`): its `prediction_type` says what is predicted: epsilon, v_prediction or sample.
        pixel_values, noise (`torch.Tensor` of shape `(batch, channels, height, width)`): clean images in [-1, 1].
        timesteps (`torch.Tensor` of shape `(batch,)`): int64.
        encoder_hidden_states (`torch.Tensor` of shape `(batch, tokens, width)`), encoder_attention_mask (`(batch,
            tokens)`): the captions.
    """
    sample = scheduler.add_noise(pixel_values, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(pixel_values, noise, timesteps)
    else:
        target = noise if scheduler.config.prediction_type == "epsilon" else pixel_values
    text = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
    prediction = model(sample, timesteps, **text, return_dict=False)[0]
    if prediction.shape != target.shape:
        raise ValueError(f"the model predicts {tuple(prediction.shape)}, not the images' {tuple(target.shape)}")
    return (prediction.float() - target).square().flatten(1).mean(dim=1)


def diffusion_loss(model, scheduler, pixel_values, encoder_hidden_states, encoder_attention_mask, weights=None):
    """Return the mean of [`denoising_errors`] at random noise levels, a scalar `torch.Tensor`.

    Args:
        model, scheduler, pixel_values, encoder_hidden_states, encoder_attention_mask: see there.
        weights (`torch.Tensor` of shape `(num_train_timesteps,)`, *optional*): weight of each timestep.
    """
    noise = torch.randn_like(pixel_values)
    timesteps = stratified_timesteps(len(pixel_values), scheduler.config.num_train_timesteps, pixel_values.device)
    text = encoder_hidden_states, encoder_attention_mask
    loss = denoising_errors(model, scheduler, pixel_values, noise, timesteps, *text)
    return loss.mean() if weights is None else (loss * weights.to(loss)[timesteps]).mean()


def contrastive_loss(image_embeds, text_embeds, logit_scale, matching=None):
    """Return the CLIP loss with several right answers, or none, a scalar `torch.Tensor`.

    Each matching pair of image and text is told from those that do not match, in the row of the image and in the
    column of the text; other matching pairs count neither for nor against it. What matches nothing is a wrong answer
    for all. With matches on the diagonal alone this is the loss of `transformers.CLIPModel`.

    Args:
        image_embeds (`torch.Tensor` of shape `(n, width)`), text_embeds (`(m, width)`): of length 1.
        logit_scale (`torch.Tensor` or `float`): factor of the cosines, the inverse of the temperature.
        matching (`torch.Tensor` of shape `(n, m)`, *optional*): bool, whether text j fits image i; by default the
            diagonal.

    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision.
    """
    logits = logit_scale * image_embeds @ text_embeds.T
    if matching is None:
        matching = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return (_find_among(logits, matching) + _find_among(logits.T, matching.T)) / 2


def _find_among(logits, matching):
    others = logits.masked_fill(matching, torch.finfo(logits.dtype).min / 2).logsumexp(dim=1, keepdim=True)
    counts = matching.sum(dim=1)
    means = (F.softplus(others - logits) * matching).sum(dim=1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1)


def sigmoid_contrastive_loss(image_embeds, text_embeds, logit_scale, logit_bias, matching=None):
    """Return the SigLIP loss, in which each pair of image and caption is judged by itself, a scalar `torch.Tensor`.

    Args:
        image_embeds, text_embeds, logit_scale, matching: see [`contrastive_loss`]; the sum is divided by n.
        logit_bias (`torch.Tensor` or `float`): added to the logits.

    Source: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, section 3.2.
    """
    logits = logit_scale * image_embeds @ text_embeds.T + logit_bias
    if matching is None:
        matching = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    signs = matching.to(logits.dtype) * 2 - 1
    return F.softplus(-signs * logits).sum() / len(logits)
