"""Adapters on the pipeline: weights by block, several at once, fusing, swapping, and those made for another model."""

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from visbio_diffusers import VisBioPipeline
from visbio_diffusers.models.lora_scales import layer_scales


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_in", "upsampler"]


@pytest.fixture
def adapter(tiny_pipeline_dir, tmp_path):
    """Return a function that writes an adapter of the tiny pipeline, from a seed, to a folder."""

    def make(name, seed=1, rank=2, targets=TARGETS):
        unet = VisBioPipeline.from_pretrained(tiny_pipeline_dir).unet
        unet.add_adapter(LoraConfig(r=rank, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(value.shape, generator=generator) * 0.3
            for name, value in sorted(get_peft_model_state_dict(unet).items())
        }
        VisBioPipeline.save_lora_weights(tmp_path / name, unet_lora_layers=weights)
        return tmp_path / name

    return make


def draw(pipe, **settings):
    seed = torch.Generator().manual_seed(0)
    return pipe("a cell", num_inference_steps=2, generator=seed, output_type="pt", **settings).images


def test_weights_of_blocks(tiny_pipeline, adapter):
    plain = draw(tiny_pipeline)
    tiny_pipeline.load_lora_weights(adapter("one"), adapter_name="one")
    full = draw(tiny_pipeline)
    none = {"unet": {"down": 0, "mid": 0, "up": 0}}
    tiny_pipeline.set_adapters("one", none)
    only_conv_in = draw(tiny_pipeline)  # which is in no block
    assert (only_conv_in - plain).abs().max() > 1e-4 and (only_conv_in - full).abs().max() > 1e-4
    for part in ("down", "mid", "up"):
        tiny_pipeline.set_adapters("one", {"unet": {**none["unet"], part: 1.0}})
        assert (draw(tiny_pipeline) - only_conv_in).abs().max() > 1e-4
    tiny_pipeline.set_adapters("one", {"unet": {"down": {"block_0": [1.0, 1.0]}, "mid": [1.0]}})
    torch.testing.assert_close(draw(tiny_pipeline), full, rtol=0, atol=0)
    tiny_pipeline.set_adapters(["one"], [0.5])
    half = draw(tiny_pipeline)
    tiny_pipeline.set_adapters("one", {"unet": {"down": 0.5, "mid": 0.5, "up": 0.5}})
    assert not torch.equal(draw(tiny_pipeline), half)  # conv_in


def test_scales_by_hand():
    layers = ["conv_in", "down_blocks.0.resnets.1.conv1", "down_blocks.1.downsampler", "up_blocks.0.upsampler",
              "mid_block.transformer_blocks.12.attn1.to_q", "up_blocks.1.resnets.0.conv2"]  # fmt: skip
    scales = {"down": {"block_0": [0.1, 0.2], "block_1": 5}, "mid": list(range(13)), "up": {"block_1": 0.7}}
    modules = [*layers, "down_blocks.0.resnets.0", *map("mid_block.transformer_blocks.{}".format, range(12))]
    found = layer_scales(layers, scales, modules)
    assert found == dict(zip(layers, [1.0, 0.2, 5.0, 1.0, 12.0, 0.7]))
    assert layer_scales(layers, 0.3) == 0.3


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"left": 1.0}, "adapter has no block 'left': it has down, mid, up"),
        ({"mid": [1.0]}, "mid of adapter has 1 weights .*: give one for each block within it"),
        ({"mid": [1.0, 1.0, 1.0]}, "mid of adapter has 3 weights"),
        ({"mid": {"block_0": 1.0}}, "mid of adapter has no block 'block_0'"),
        ({"down": {"block_1": 1.0}}, "down of adapter has no block 'block_1': it has block_0"),
        ({"down": {"block_0": [1.0]}}, "block_0 of down of adapter has 1 weights"),
        ({"up": [1.0, 2.0]}, "up of adapter has 2 weights"),
        ({"up": "all"}, "up of adapter has the weight 'all': give a number"),
    ],
)
def test_scales_that_fit_no_block_are_named(scale, message):
    adapted = ["mid_block.transformer_blocks.1.attn1.to_q"]
    modules = ["mid_block.transformer_blocks.0", *adapted, "down_blocks", "down_blocks.0", "down_blocks.0.resnets.0"]
    modules += ["down_blocks.0.resnets.1.conv1", "up_blocks.0.upsampler"]
    with pytest.raises(ValueError, match=message):
        layer_scales(adapted, scale, modules)
    fitting = {"down": {"block_0": [0.0, 0.0]}, "up": 0.0, "mid": 0.5}
    assert layer_scales(adapted, fitting, modules) == {adapted[0]: 0.5}


def test_several_adapters_fused_and_taken_away(tiny_pipeline, adapter):
    plain = draw(tiny_pipeline)
    tiny_pipeline.load_lora_weights(adapter("one"), adapter_name="one")
    first = draw(tiny_pipeline)
    tiny_pipeline.load_lora_weights(adapter("two", seed=2, targets=["to_q"]), adapter_name="two")
    tiny_pipeline.set_adapters(["one", "two"], [0.7, 0.4])
    both = draw(tiny_pipeline)
    assert tiny_pipeline.get_active_adapters() == ["one", "two"]
    tiny_pipeline.fuse_lora(adapter_names=["one", "two"])
    torch.testing.assert_close(draw(tiny_pipeline), both, rtol=0, atol=1e-4)
    tiny_pipeline.unfuse_lora()
    torch.testing.assert_close(draw(tiny_pipeline), both, rtol=0, atol=1e-4)
    tiny_pipeline.delete_adapters("two")
    tiny_pipeline.set_adapters("one", 1.0)
    torch.testing.assert_close(draw(tiny_pipeline), first, rtol=0, atol=1e-4)
    tiny_pipeline.disable_lora()
    torch.testing.assert_close(draw(tiny_pipeline), plain, rtol=0, atol=1e-4)
    tiny_pipeline.enable_lora()
    tiny_pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(tiny_pipeline), plain, rtol=0, atol=1e-4)


def test_hot_swap(tiny_pipeline, adapter):
    one, two = adapter("one"), adapter("two", seed=2, rank=4)
    drawn = []
    for folder in (one, two):
        tiny_pipeline.load_lora_weights(folder, adapter_name="plain")
        drawn.append(draw(tiny_pipeline))
        tiny_pipeline.unload_lora_weights()
    tiny_pipeline.unet.enable_lora_hotswap(target_rank=4)
    tiny_pipeline.load_lora_weights(one, adapter_name="swapped")
    torch.testing.assert_close(draw(tiny_pipeline), drawn[0], rtol=0, atol=1e-4)
    tiny_pipeline.load_lora_weights(two, adapter_name="swapped", hotswap=True)
    torch.testing.assert_close(draw(tiny_pipeline), drawn[1], rtol=0, atol=1e-4)
    assert tiny_pipeline.get_active_adapters() == ["swapped"]


def test_adapter_of_another_model_is_refused_by_name(tiny_pipeline, adapter, tiny_unet):
    plain = draw(tiny_pipeline)
    weights, _ = tiny_pipeline.lora_state_dict(adapter("one"))
    narrow = "unet.mid_block.transformer_blocks.0.attn1.to_q.lora_A.weight"
    deeper = {name.replace("blocks.0.attn1", "blocks.9.attn1"): value for name, value in weights.items()}
    wider = weights | {narrow: weights[narrow].repeat(1, 2)}
    older = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for name, v in deeper.items()}
    whole = {narrow.replace(".to_q", ".to_out"): weights[narrow]}
    text = {**weights, "text_encoder.layer.lora_A.weight": torch.zeros(2, 2)}
    message = "the adapter was made for another model: "
    for state, reason in (
        (deeper, r"this one has no layer mid_block\.transformer_blocks\.9\.attn1"),
        (wider, r"its layer mid_block\.transformer_blocks\.0\.attn1\.to_q takes \(64,\) features, this .* \(32,\)"),
        (older, r"this one has no layer mid_block\.transformer_blocks\.9\.attn1"),
        (whole, r"this one has no layer mid_block\.transformer_blocks\.0\.attn1\.to_out"),
        (text, "it holds text_encoder.layer.lora_A.weight"),
    ):
        with pytest.raises(ValueError, match=message + reason):
            tiny_pipeline.load_lora_weights(state)
    assert tiny_pipeline.get_list_adapters() == {}
    torch.testing.assert_close(draw(tiny_pipeline), plain, rtol=0, atol=0)


def test_callback_may_change_the_weight_of_an_adapter_of_the_text(tiny_pipeline, adapter):
    tiny_pipeline.load_lora_weights(adapter("one", targets=["attn2.to_k", "attn2.to_v"]), adapter_name="one")
    full = draw(tiny_pipeline)

    def turn_off(pipe, step, timestep, tensors):
        pipe.set_adapters("one", 0.0)
        return {}

    changed = draw(tiny_pipeline, callback_on_step_end=turn_off)
    assert (changed - full).abs().max() > 1e-4  # the second step had no adapter

    def unload(pipe, step, timestep, tensors):
        pipe.unload_lora_weights()
        return {}

    tiny_pipeline.set_adapters("one", 1.0)
    torch.testing.assert_close(draw(tiny_pipeline, callback_on_step_end=unload), changed, rtol=0, atol=1e-5)


def test_dropout_of_the_training_is_over(tiny_pipeline, tiny_pipeline_dir, tmp_path):
    unet = VisBioPipeline.from_pretrained(tiny_pipeline_dir).unet
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=TARGETS, init_lora_weights=False)
    unet.add_adapter(config)
    weights, metadata = get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
    VisBioPipeline.save_lora_weights(tmp_path, unet_lora_layers=weights, unet_lora_adapter_metadata=metadata)
    tiny_pipeline.load_lora_weights(tmp_path)
    assert tiny_pipeline.unet.peft_config["default_0"].lora_dropout == 0.5
    assert not any(module.training for module in tiny_pipeline.unet.modules())
