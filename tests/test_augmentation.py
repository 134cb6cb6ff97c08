"""Images as another microscope would show them: in range, changed in the way that is said, and from one seed."""

import torch

from visbio_diffusers.augmentation import blur, rescale, turn_and_zoom, vary_photographs, vary_stain


def photographs(n=8, side=28):
    rows = torch.linspace(-1, 1, side)
    wave = torch.sin(6 * rows[:, None]) * torch.cos(9 * rows)
    return (wave * torch.tensor([0.9, 0.5, -0.4])[:, None, None]).expand(n, 3, side, side).contiguous()


def test_varied_images_are_in_range_of_one_seed_and_each_of_its_own():
    images = photographs(64)
    torch.manual_seed(3)
    first = vary_photographs(images)
    torch.manual_seed(3)
    assert torch.equal(first, vary_photographs(images))
    assert first.shape == images.shape and first.abs().max() <= 1 and torch.isfinite(first).all()
    assert (first[0] - first[1]).abs().max() > 0.1
    one = vary_photographs(images[:1, :1])
    assert one.shape == (1, 1, 28, 28)


def test_stain_leaves_white_white_and_shapes_in_place():
    torch.manual_seed(0)
    images = photographs()
    assert torch.allclose(vary_stain(images, strength=0.0), images.clamp(min=2 / 255 - 1), atol=1e-5)
    varied = vary_stain(images)
    for channel in range(3):
        pairs = torch.stack([varied[:, channel].flatten(), images[:, channel].flatten()])
        assert torch.corrcoef(pairs)[0, 1] > 0.7
    assert vary_stain(torch.ones(50, 3, 4, 4)).min() > 0.6  # the empty slide stays light


def test_blur_and_rescaling_take_detail_away():
    images = photographs() + 0.2 * torch.randn(8, 3, 28, 28)

    def detail(some):
        return (some[..., 1:] - some[..., :-1]).square().mean()

    assert torch.allclose(blur(images, torch.zeros(8)), images, atol=1e-6)
    assert detail(blur(images, torch.ones(8))) < 0.4 * detail(images)
    assert detail(rescale(images, 0.5)) < 0.5 * detail(images) and rescale(images, 0.5).shape == images.shape


def test_turning_keeps_an_image_without_direction():
    side = torch.linspace(-1, 1, 28)
    disc = torch.exp(-4 * (side[:, None].square() + side.square())).expand(6, 3, 28, 28)
    torch.manual_seed(1)
    turned = turn_and_zoom(disc)
    mass = turned.mean(dim=(1, 2, 3)) / disc.mean()
    assert mass.min() > 0.5 and mass.max() < 1.9 and mass.std() > 0.05  # zoomed
