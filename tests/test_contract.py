"""What users of Diffusers rely on: adapters, fusing, backends, checkpointing, casting, loading in a new process.

Diffusers' own tester mixins, pointed at VisBioUNet and VisBioPipeline, cover more; they are run outside the project.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from peft import LoraConfig

from visbio_diffusers import VisBioPipeline


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
NEW_PROCESS = """
import json, sys, time
from diffusers import AutoModel, DiffusionPipeline

seconds = time.process_time()  # of the processor: a busy machine is no matter
import visbio_diffusers

seconds = time.process_time() - seconds
import numpy as np
import torch

folder, images = sys.argv[1:]
pipes = [DiffusionPipeline.from_pretrained(folder), visbio_diffusers.VisBioPipeline.from_pretrained(folder)]
pipes.append(visbio_diffusers.VisBioPipeline.from_pretrained(folder, unet=None))
pipes[2].register_modules(unet=AutoModel.from_pretrained(folder, subfolder="unet"))
arguments = dict(prompt="a cell", num_inference_steps=3, guidance_scale=2.0, output_type="np")
np.save(images, [pipe(**arguments, generator=torch.Generator().manual_seed(0)).images[0] for pipe in pipes])
print(json.dumps({"seconds": seconds, "classes": [type(pipe).__name__ for pipe in pipes]}))
"""


def _inputs():
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    return sample, torch.tensor([700, 20]), text, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


@torch.no_grad()
def _run(unet):
    return unet(*_inputs(), return_dict=False)[0]


def _attentions(unet):
    return [module for module in unet.modules() if isinstance(module, AttentionModuleMixin)]


def test_lora_changes_and_removed_restores(tiny_unet, tmp_path):
    unet = tiny_unet()
    plain, names = _run(unet), list(unet.state_dict())
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    adapted = {name.split(".lora_A")[0] for name in unet.state_dict() if ".lora_A" in name}
    assert len(adapted) == 4 * len(_attentions(unet)) == 20
    with_adapter = _run(unet)
    assert (with_adapter - plain).abs().max() > 1e-2
    unet.save_lora_adapter(tmp_path)
    unet.unload_lora()
    assert torch.equal(_run(unet), plain) and list(unet.state_dict()) == names
    unet.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(_run(unet), with_adapter)
    unet.set_adapters("default_0", 0.0)
    assert torch.equal(_run(unet), plain)


def test_fused_projections_are_equal_and_come_apart(tiny_unet):
    unet = tiny_unet()
    plain, names = _run(unet), list(unet.state_dict())
    unet.fuse_qkv_projections()
    assert all(attention.fused_projections for attention in _attentions(unet))
    torch.testing.assert_close(_run(unet), plain, atol=2e-5, rtol=1e-5)
    unet.unfuse_qkv_projections()
    assert torch.equal(_run(unet), plain) and list(unet.state_dict()) == names


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backend_reaches_every_layer(tiny_unet, backend):
    unet = tiny_unet()
    plain = _run(unet)
    with attention_backend(AttentionBackendName.NATIVE):  # puts back the process' backend, set in the next line too
        unet.set_attention_backend(backend)
        backends = {attention.processor._attention_backend for attention in _attentions(unet)}
        assert backends == {AttentionBackendName(backend)}
        torch.testing.assert_close(_run(unet), plain, atol=2e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_equal_gradients(tiny_unet):
    unet, gradients = tiny_unet().train(), []
    for _ in range(2):
        unet.zero_grad()
        unet(*_inputs()).sample.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in unet.named_parameters()})
        unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_layerwise_casting_stores_in_float8_and_still_draws(tiny_unet):
    unet = tiny_unet()
    plain = _run(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in unet.named_parameters()}
    assert stored["mid_block.transformer_blocks.0.attn1.to_q.weight"] == torch.float8_e4m3fn
    assert stored["time_embedding.linear_1.weight"] == stored["conv_norm_out.weight"] == torch.float32
    error = (_run(unet) - plain).square().mean() / plain.square().mean()
    assert 0 < error < 0.05


def test_group_offloading_brings_every_block(tiny_unet):
    """A group of weights arrives when its first block is called; a block that is never called would stay away."""
    unet, called = tiny_unet(), set()
    unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    hooked = [module for module in unet.modules() if "_diffusers_hook" in vars(module)]
    leaders = {module._diffusers_hook.get_hook("group_offloading").group.onload_leader for module in hooked}
    assert {*unet.down_blocks, *unet.up_blocks, *unet.text_blocks} < leaders
    for leader in leaders:
        leader.register_forward_hook(lambda module, *_: called.add(module))
    _run(unet)
    assert called == leaders


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(threshold=1e9), PyramidAttentionBroadcastConfig(2)])
def test_cache_of_diffusers_reaches_the_transformer(tiny_pipeline, tiny_unet, config):
    def draw():
        generator = torch.Generator().manual_seed(0)
        return tiny_pipeline("a cell", num_inference_steps=6, generator=generator, output_type="pt").images

    tiny_pipeline.register_modules(unet=tiny_unet(cross_attention_dim=32, sample_size=8))
    plain = draw()
    config.current_timestep_callback = lambda: tiny_pipeline.current_timestep
    tiny_pipeline.unet.enable_cache(config)
    assert tiny_pipeline.unet.is_cache_enabled
    assert (draw() - plain).abs().max() > 1e-4
    tiny_pipeline.unet.disable_cache()
    assert torch.equal(draw(), plain)


@pytest.fixture(scope="module")
def new_process(tiny_pipeline_dir, tmp_path_factory):
    """Return what a process that loads the saved pipeline in three ways reports, and the images it drew."""
    images = tmp_path_factory.mktemp("new-process") / "images.npy"
    command = [sys.executable, "-c", NEW_PROCESS, str(tiny_pipeline_dir), str(images)]
    root, threads = Path(__file__).parents[1], {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=root, env=threads, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), np.load(images)


def test_new_process_draws_the_same_images(new_process, tiny_pipeline_dir):
    report, images = new_process
    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    generator = torch.Generator().manual_seed(0)
    here = pipe("a cell", num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="np").images[0]
    assert report["classes"] == ["VisBioPipeline"] * 3 and here.std() > 0.05
    assert all(np.array_equal(image, here) for image in images)


def test_model_index_names_our_library(tiny_pipeline_dir):
    index = json.loads((tiny_pipeline_dir / "model_index.json").read_text())
    assert index["_class_name"] == "VisBioPipeline"
    assert index["unet"] == ["visbio_diffusers", "VisBioUNet"]


def test_import_adds_little_to_that_of_diffusers(new_process):
    assert new_process[0]["seconds"] < 0.3


def test_auto_pipelines_find_ours_for_each_task(tiny_pipeline_dir):
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(tiny_pipeline_dir)
    redraw = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    inpaint = diffusers.AutoPipelineForInpainting.from_pipe(redraw)
    found = [type(each).__name__ for each in (pipe, redraw, inpaint)]
    assert found == ["VisBioPipeline", "VisBioImg2ImgPipeline", "VisBioInpaintPipeline"]
    assert inpaint.unet is redraw.unet is pipe.unet
    assert type(diffusers.AutoPipelineForText2Image.from_pipe(inpaint)).__name__ == "VisBioPipeline"


def test_no_pickle_is_written(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    loaded = VisBioPipeline.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.unet.parameters(), tiny_pipeline.unet.parameters()))
