"""Our loss beside that of the last DDPO trainer of TRL: pip install --no-deps trl==0.23.1 (it needs no more)."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from visbio_diffusers.objectives import clipped_ratio_loss
from visbio_diffusers.rollouts import Text, collect, make_policy


ddpo = pytest.importorskip("trl.trainer.ddpo_trainer", reason="needs pip install --no-deps trl==0.23.1")


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_loss_divergence_clipping_and_gradients_are_those_of_trl(tiny_unet, guidance_scale, prediction_type):
    from trl.models.modeling_sd_base import scheduler_step

    unet = tiny_unet(sample_size=8)
    torch.manual_seed(0)
    text = Text(torch.randn(6, 5, 24), None, torch.randn(1, 5, 24).expand(6, -1, -1), None)
    own = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    policy = make_policy(own, 8, guidance_scale, 1.0, "mean")._replace(train_empty=True)
    rollout = collect(unet, policy, text, torch.Generator().manual_seed(1), policy.stochastic.tolist()[:-1])
    with torch.no_grad():  # another policy than that of the samples, so that ratios are not 1
        for parameter in unet.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    advantages = torch.linspace(-7, 3, 6)

    config = SimpleNamespace(
        train_cfg=guidance_scale > 1, sample_guidance_scale=guidance_scale, sample_eta=1.0, train_adv_clip_max=5.0,
        train_clip_range=1e-4,
    )  # fmt: skip
    trainer = ddpo.DDPOTrainer.__new__(ddpo.DDPOTrainer)
    trainer.config, trainer.autocast = config, nullcontext
    trainer.sd_pipeline = SimpleNamespace(unet=unet, scheduler_step=partial(scheduler_step, policy.scheduler))
    embeds = torch.cat([text.empty_states, text.states]) if config.train_cfg else text.states

    for step, timestep in enumerate(rollout.timesteps.tolist()):
        stored = rollout.before[step], torch.full((6,), timestep), rollout.after[step], rollout.log_probs[step]
        found = []
        for side in ("trl", "own"):
            unet.zero_grad()
            if side == "trl":
                loss, approx_kl, clip_fraction = trainer.calculate_loss(*stored, advantages, embeds)
            else:
                log_prob = policy.step(unet, stored[0], stored[1], text).log_prob(stored[2], "mean")
                loss, metrics = clipped_ratio_loss(log_prob, stored[3], advantages, 1e-4, 5.0)
                approx_kl, clip_fraction = metrics["approx_kl"], metrics["clip_fraction"]
            loss.backward()
            grads = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])
            found.append((loss.detach(), approx_kl.detach(), clip_fraction, grads))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert found[0][3].abs().max() > 1e-4
