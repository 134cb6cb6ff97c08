"""The table of what `tests/benchmarks/bench_gpu.py` has measured, for a card."""

from __future__ import annotations


def render_speed(results: dict) -> str:
    """Return speed and memory of training and sampling beside Diffusers' UNet, as Markdown."""
    lines = [
        "| | Batch | Images/s | TFLOP/s | Share of a matrix product's | Peak GB |",
        "|" + " --- |" * 6,
    ]
    for part in ("train", "sample"):
        for name, row in results.get(part, {}).items():
            if isinstance(row, dict):
                keys = ("batch_size", "images_per_second", "tflops", "share_of_matmul", "peak_gb")
                cells = [
                    f"{row[key]:.3g}" if isinstance(row.get(key), float) else str(row.get(key, "-")) for key in keys
                ]
                lines.append(f"| {part}: {name} | " + " | ".join(cells) + " |")
    ratios = [
        f"{part}: {name} {row:.2f} x" if name.startswith("times as fast as") else f"{part}: {row:.2f} x as fast"
        for part in ("train", "sample")
        for name, row in results.get(part, {}).items()
        if not isinstance(row, dict)
    ]
    lines += ["", "; ".join(ratios) + "." if ratios else ""]
    if "matmul" in results:
        lines.append(f"A bf16 product of 8192 x 8192 reaches {results['matmul']['tflops']:.0f} TFLOP/s on this card.")
    if "profile" in results:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in results["profile"]["share"].items())
        lines.append(f"Kernel time of a training step: {shares}.")
    if "memory" in results:
        found = results["memory"]["rtx3050"]
        lines.append(f"The preset rtx3050, capped at {found['cap_gb']:g} GB, takes {found['peak_gb']:.1f} GB.")
    return "\n".join([*lines, "", f"{results['device']}, `tests/benchmarks/bench_gpu.py`"]) + "\n"
