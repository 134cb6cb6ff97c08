"""VisBioUNet: what it takes, how text reaches the image, what may not change the result, that it learns."""

import pytest
import torch
from diffusers import DDPMScheduler

from visbio_diffusers import VisBioUNet
from visbio_diffusers.losses import diffusion_loss
from visbio_diffusers.models.unet_visbio import sinusoidal_positions


def _inputs(batch=2, channels=3, size=(8, 8), tokens=5, width=24):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, channels, *size, generator=generator)
    return sample, torch.tensor([700, 20][:batch]), torch.randn(batch, tokens, width, generator=generator)


def _run(unet, *args, **kwargs):
    with torch.no_grad():
        return unet(*args, **kwargs, return_dict=False)[0]


@pytest.mark.parametrize(
    ("size", "channels"), [((28, 28), 3), ((32, 32), 1), ((64, 64), 3), ((36, 20), 3), ((4, 60), 1)]
)
def test_every_multiple_of_its_factor_fits(tiny_unet, size, channels):
    unet = tiny_unet(in_channels=channels, out_channels=channels)
    inputs = _inputs(channels=channels, size=size)
    prediction = _run(unet, *inputs)
    assert prediction.shape == inputs[0].shape
    assert prediction.isfinite().all() and prediction.std() > 0.1


def test_result_is_a_tuple_or_an_output_and_timesteps_may_be_numbers(tiny_unet):
    unet, (sample, _, text) = tiny_unet(), _inputs()
    expected = _run(unet, sample, torch.tensor([700, 700]), text)
    for timestep in (700, 700.0, torch.tensor(700), torch.tensor([700]), torch.tensor([700.0, 700.0])):
        assert torch.equal(unet(sample, timestep, text).sample, expected)
    assert (_run(unet, sample, 699.5, text) - expected).abs().max() > 1e-4


def test_padding_does_not_matter_and_tokens_do(tiny_unet):
    unet, (sample, timestep, text) = tiny_unet(), _inputs()
    alone = _run(unet, sample, timestep, text)
    mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
    for padding in (torch.zeros(2, 3, 24), torch.full((2, 3, 24), 50.0), text[:, :3]):
        padded = _run(unet, sample, timestep, torch.cat([text, padding], dim=1), mask)
        torch.testing.assert_close(padded, alone, atol=2e-5, rtol=1e-5)
    attended = _run(unet, sample, timestep, torch.cat([text, padding], dim=1))
    assert (attended - alone).abs().max() > 1e-2


def test_a_row_of_padding_alone_gives_numbers(tiny_unet):
    unet, (sample, timestep, text) = tiny_unet(), _inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0] * 5])
    prediction = unet(sample, timestep, text, mask).sample
    prediction.square().mean().backward()
    assert prediction.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in unet.parameters())
    torch.testing.assert_close(
        prediction[:1], _run(unet, sample[:1], timestep[:1], text[:1, :3]), atol=2e-5, rtol=1e-5
    )


def test_text_cache_is_exact_and_saves_the_work(tiny_unet):
    unet, (sample, timestep, text) = tiny_unet(), _inputs()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    calls = []
    for name, module in unet.named_modules():
        if name.startswith("text_") or "attn2.to_k" in name or "attn2.to_v" in name:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    plain = [_run(unet, sample, t, text, mask) for t in (timestep, timestep // 2)]
    once = len(calls) // 2
    assert once > 8
    cache = {}
    cached = [_run(unet, sample, t, text, mask, text_cache=cache) for t in (timestep, timestep // 2)]
    assert all(torch.equal(a, b) for a, b in zip(plain, cached))
    assert len(calls) == 3 * once


@pytest.mark.parametrize("route", ["use_film", "use_cross_attention"])
def test_each_route_of_the_text_works_alone(tiny_unet, route):
    off = {"use_film", "use_cross_attention"} - {route}
    unet, (sample, timestep, text) = tiny_unet(**{name: False for name in off}), _inputs()
    missing = "text_film" if route == "use_cross_attention" else "attn2"
    assert not any(missing in name for name, _ in unet.named_parameters())
    difference = (_run(unet, sample, timestep, text) - _run(unet, sample, timestep, text.flip(0))).abs()
    assert difference.amax(dim=(1, 2, 3)).min() > 1e-2


def test_a_new_model_already_hears_the_text(tiny_unet):
    torch.manual_seed(0)
    unet, (sample, timestep, text) = VisBioUNet(**tiny_unet().config), _inputs()
    assert (_run(unet, sample, timestep, text) - _run(unet, sample, timestep, text.flip(0))).abs().max() > 1e-4


@pytest.mark.parametrize("config", [{}, {"use_film": False}, {"use_cross_attention": False, "num_text_layers": 2}])
def test_every_parameter_gets_a_gradient(tiny_unet, config):
    unet, inputs = tiny_unet(**config).train(), _inputs()
    target = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    (unet(*inputs).sample * target).sum().backward()
    without = [name for name, parameter in unet.named_parameters() if not parameter.grad.abs().sum() > 0]
    # A bias under a softmax-normalised key would be one; there is none.
    assert not without


def test_a_batch_is_its_images(tiny_unet):
    unet, (sample, timestep, text) = tiny_unet(), _inputs(size=(28, 28))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    together = _run(unet, sample, timestep, text, mask)
    for k in range(2):
        one = slice(k, k + 1)
        alone = _run(unet, sample[one], timestep[one], text[one], mask[one])
        torch.testing.assert_close(together[one], alone, atol=2e-5, rtol=1e-5)


def test_fused_projections_and_checkpointing_change_nothing(tiny_unet):
    unet, inputs = tiny_unet(), _inputs()
    expected = unet(*inputs).sample
    expected.square().mean().backward()
    gradient = unet.conv_in.weight.grad.clone()
    unet.zero_grad()
    unet.train().enable_gradient_checkpointing()
    unet(*inputs).sample.square().mean().backward()
    torch.testing.assert_close(unet.conv_in.weight.grad, gradient)
    unet.eval().fuse_qkv_projections()
    torch.testing.assert_close(_run(unet, *inputs), expected.detach(), atol=2e-5, rtol=1e-5)


def test_it_knows_where_in_the_image_it_is(tiny_unet):
    """Far from the borders of an even image only the positions tell two places apart."""
    unet, (_, timestep, text) = tiny_unet(), _inputs(batch=1)
    prediction = _run(unet, torch.zeros(1, 3, 96, 96), timestep, text)[0]
    for row, column in ((44, 48), (48, 44), (44, 44)):  # whole tokens away from (48, 48)
        assert (prediction[:, row, column] - prediction[:, 48, 48]).abs().max() > 1e-3


def test_positions_by_hand():
    """Row 2, column 3, width 8: frequencies 1 and 1e-4; sines and cosines of the row, then of the column."""
    position = sinusoidal_positions(4, 5, 8, torch.device("cpu"), torch.float32)[0, 2 * 5 + 3]
    row, column = torch.tensor([2.0, 2e-4]), torch.tensor([3.0, 3e-4])
    expected = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()])
    torch.testing.assert_close(position, expected)


def test_takes_pubmedbert_width(tiny_unet):
    unet = tiny_unet(cross_attention_dim=768)
    assert _run(unet, *_inputs(width=768)).isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"size": (30, 28)}, r"height and width must be multiples of 4, got \(30, 28\)"),
        ({"width": 32}, "encoder_hidden_states has width 32, this model takes 24: encode the prompt with"),
    ],
)
def test_inputs_that_do_not_fit(tiny_unet, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_unet()(*_inputs(**inputs))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_out_channels": (32,)}, "at least two stages"),
        ({"block_out_channels": (16, 24, 48), "norm_num_groups": 16}, "24 is no multiple of norm_num_groups=16"),
        ({"block_out_channels": (16, 40), "attention_head_dim": 16}, "40, .*multiple of attention_head_dim=16"),
        ({"use_film": False, "use_cross_attention": False}, "both off: text could not reach the image"),
    ],
)
def test_shapes_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message) as error:
        VisBioUNet(**config)
    assert "\n" not in str(error.value)


def test_learns_two_kinds_of_blob_from_their_names():
    """The loss falls to a fraction, and the other kind's name makes it several times as large."""
    torch.manual_seed(0)
    unet = VisBioUNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        num_transformer_layers=2,
        attention_head_dim=16,
        cross_attention_dim=8,
        film_dim=32,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    blobs = -torch.ones(2, 1, 8, 8)
    blobs[0, :, 1:4, 1:4] = blobs[1, :, 4:7, 4:7] = 1  # a bright square above left, or below right
    names, mask = torch.randn(2, 3, 8), torch.ones(2, 3)
    labels = torch.arange(16) % 2
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    losses = []
    for _ in range(120):
        brightness = 1 - 0.2 * torch.rand(16, 1, 1, 1)
        loss = diffusion_loss(unet, scheduler, blobs[labels] * brightness, names[labels], mask[labels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = sum(losses[-20:]) / 20
    assert last < 0.2 * sum(losses[:5]) / 5
    with torch.no_grad():
        wrong = diffusion_loss(unet.eval(), scheduler, blobs[labels] * 0.9, names[1 - labels], mask[labels])
    assert wrong > 5 * last
