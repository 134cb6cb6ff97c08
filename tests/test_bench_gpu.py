"""The GPU benchmark on a CPU, with tiny models: its count of operations by hand, and its figures from end to end."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn


BENCH = runpy.run_path(str(Path(__file__).parent / "benchmarks" / "bench_gpu.py"))
OTHER = BENCH["OTHER"]


def products(unet, batch_size=2):
    """Return the GFLOP for an image of each convolution and linear layer in a forward pass, by name."""
    found = {}

    def hook(name, module, output):
        positions = output[:, 0].numel() if isinstance(module, nn.Conv2d) else output.numel() // output.shape[-1]
        found[name] = 2 * positions * module.weight.numel() / batch_size / 1e9

    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, _, output, name=name: hook(name, module, output))
    counted = BENCH["count_flops"](unet, torch.device("meta"))
    return found, *counted


def test_operations_of_ours_are_those_counted_by_hand():
    unet = BENCH["make_unet"]("visbio").to("meta")
    layers, forward, backward = products(unet)
    image, text, width = 16 * 16, 48, 384
    attention = 8 * 4 * image * width * (image + text) + 4 * text * width * text
    mean_text = 2 * text * width / 1e9
    assert forward == pytest.approx(sum(layers.values()) + attention / 1e9 + mean_text)
    given = layers["conv_in"] + layers["time_embedding.linear_1"] + mean_text  # of image, time and mask: no gradient
    assert backward == pytest.approx(2 * forward - given)


def test_operations_and_parameters_of_the_peer():
    unet = BENCH["make_unet"]("diffusers").to("meta")
    layers, forward, backward = products(unet)
    attention = sum(
        blocks * 4 * image * width * (image + 48) for blocks, image, width in ((5, 32 * 32, 128), (6, 16 * 16, 256))
    )
    assert forward == pytest.approx(sum(layers.values()) + attention / 1e9)
    given = sum(each for name, each in layers.items() if "attn2.to_k" in name or "attn2.to_v" in name)
    given += layers["conv_in"] + layers["time_embedding.linear_1"]
    assert backward == pytest.approx(2 * forward - given)
    assert unet.num_parameters() == pytest.approx(BENCH["make_unet"]("visbio").num_parameters(), rel=0.03)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused_convolution_native_group_norm_silu_3", OTHER),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", OTHER),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("sm90_xmma_wgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128>", "convolutions"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata>", "optimizer, clipping, EMA"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert BENCH["kind_of"](name) == kind


def test_summary_of_kernels():
    kernels = [
        {"cat": "kernel", "name": "nvjet_a", "ts": 0.0, "dur": 30.0},
        {"cat": "kernel", "name": "triton_red_b", "ts": 30.0, "dur": 10.0},
        {"cat": "kernel", "name": "nvjet_a", "ts": 60.0, "dur": 40.0},
        {"cat": "gpu_user_annotation", "name": "a whole step", "ts": 0.0, "dur": 100.0},
    ]
    found = BENCH["summarize"](kernels, 2)
    assert found["share"] == {"matrix products": 70 / 80, OTHER: 10 / 80}
    assert found["busy"] == 80 / 100 and found["top"][0] == ["nvjet_a", 70 / 1000 / 2, 70 / 80]


def test_bench_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "bench.json"
    flags = "--device cpu --small --no-compile --sections matmul sample train profile --variants --batch_size 2"
    flags += " --blocks 2 --steps_per_block 1 --sample_batch_size 2 --steps 3 --ddim_steps 4 --output"
    found = BENCH["main"]([*flags.split(), str(file)])
    written, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert not written["errors"] and written["train"] == found["train"]
    train = written["train"]
    for side in ("visbio", "diffusers"):
        row = train[side]
        assert 0 < row["slowest"] <= row["images_per_second"] <= row["fastest"]
        gflop = row["gflop_forward"] + row["gflop_backward"]
        assert row["share_of_matmul"] == pytest.approx(
            row["images_per_second"] * gflop / 1e3 / written["matmul"]["tflops"]
        )
        assert f"| train: {side} | 2 | {row['images_per_second']:.4g} |" in printed
    assert train["times as fast"] == train["visbio"]["images_per_second"] / train["diffusers"]["images_per_second"]
    assert {"visbio DPM-Solver++ 3", "diffusers DPM-Solver++ 3", "diffusers DDIM 4"} < set(written["sample"])


def test_a_section_that_fails_does_not_end_the_run(tmp_path):
    flags = "--device cpu --small --no-compile --sections sample matmul --sample_batch_size 1 --steps 0 --output"
    found = BENCH["main"]([*flags.split(), str(tmp_path / "bench.json")])
    assert "num_inference_steps" in found["errors"]["sample"] and found["matmul"]["tflops"] > 0
