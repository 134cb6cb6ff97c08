"""Compiled channels-last images keep their layout, and have the values of PyTorch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from visbio_diffusers import VisBioUNet
from visbio_diffusers.models.channels_last import GroupNorm, pixel_shuffle


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 6, 10, generator=generator).to(memory_format=torch.channels_last).requires_grad_()


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def is_channels_last(images):
    return images.is_contiguous(memory_format=torch.channels_last)


def test_group_norm(images):
    norm = GroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    found = {}
    for name, function in ("eager", norm), ("compiled", compiled(norm)):
        result = function(images)
        gradients = torch.autograd.grad((result**3).mean(), [images, norm.weight, norm.bias])
        found[name] = [result, *gradients]
    for eager, ours in zip(found["eager"], found["compiled"], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert is_channels_last(found["compiled"][0])


def test_group_norm_keeps_bfloat16(images):
    norm = compiled(GroupNorm(4, 8))
    result = norm(images.detach().bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), norm(images), rtol=0.02, atol=0.02)


def test_pixel_shuffle(images):
    result = compiled(pixel_shuffle)(images, 2)
    assert torch.equal(result, F.pixel_shuffle(images, 2))
    assert is_channels_last(result)


def test_no_layer_of_the_unet_changes_the_layout(monkeypatch):
    own = F.group_norm  # on a GPU it begins with a copy (ATen/native/group_norm.cpp), on a CPU it does not
    monkeypatch.setattr(F, "group_norm", lambda input, *args, **kwargs: own(input.contiguous(), *args, **kwargs))
    layouts = []

    def keep_layouts(graph, _):
        convolutions = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default
        for node in graph.graph.nodes:
            if node.target == convolutions[0]:
                layouts.append(is_channels_last(node.args[0].meta["val"]))
            if node.target == convolutions[1]:  # of the gradient, and of the images
                layouts.extend(is_channels_last(each.meta["val"]) for each in node.args[:2])
        return make_boxed_func(graph.forward)

    model = VisBioUNet(sample_size=8, block_out_channels=(16, 32), num_transformer_layers=1, film_dim=32)
    model.to(memory_format=torch.channels_last)
    sample = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    inputs = sample, torch.tensor([10, 500]), torch.randn(2, 5, model.config.cross_attention_dim)
    run = torch.compile(model, backend=aot_autograd(fw_compiler=keep_layouts), fullgraph=True)
    result = run(*inputs).sample
    torch.testing.assert_close(result, model(*inputs).sample, rtol=1e-4, atol=1e-5)
    result.to(memory_format=torch.channels_last).square().mean().backward()
    assert len(layouts) == 3 * sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert all(layouts)
