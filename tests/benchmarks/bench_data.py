"""How fast images reach the model, in every form, beside `datasets` with the transforms of Diffusers' example script.

python tests/benchmarks/bench_data.py [--num_images 8000] [--long 1000000] [--output JSON]
The cells of VISBIO_DATA/pbc64 at 64 pixels, as npz, JPEG in parquet, image folder and shards; each side in a process
of its own with two workers, batches of 64, flips and captions: one epoch from a cold start of the process. Then as
many samples as --long from shards, in which memory must stay flat. torchvision is not needed here, so the peer's
transforms are what it does: Pillow's resize and crop, a flip, and a tensor in [-1, 1].
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch


BATCH, SIDE, WORKERS = 64, 64, 2
LONG = "shards, nothing kept"
DATA = Path(os.environ.get("VISBIO_DATA") or Path(__file__).parents[3] / "shared" / "data")


def prepare(folder: Path, num_images: int) -> None:
    """Write the same JPEG files in every form."""
    import pyarrow.parquet as parquet

    from visbio_diffusers.data import load_image_dataset
    from visbio_diffusers.data.pack import Packing, pack_shards

    cells = load_image_dataset(str(DATA / "pbc64"), caption_bank="bloodmnist", max_samples=num_images)
    images = np.stack([cells[row]["image"] for row in range(len(cells))])
    np.savez(folder / "bloodmnist_64.npz", train_images=images, train_labels=cells.labels[:, None])
    table = parquet.read_table(DATA / "pbc64" / "train.parquet")
    parquet.write_table(table.slice(0, num_images), folder / "train.parquet")
    train = folder / "imagefolder" / "train"
    train.mkdir(parents=True)
    with (train / "metadata.jsonl").open("w") as file:
        for row in range(len(cells)):
            (train / f"{row}.jpg").write_bytes(cells.images.encoded(row))
            text = f"a {cells.class_names[cells.labels[row]]}"
            file.write(json.dumps({"file_name": f"{row}.jpg", "text": text}) + "\n")
    packing = Packing(image_format="original", samples_per_shard=1000)
    pack_shards(cells, folder / "shards" / "train", packing, 2)


def own_batches(name: str, bank: str | None, keep: bool = True):
    """Return the stream of a training; of a small set the decoded images are kept, unless `keep` is False."""
    from visbio_diffusers.data import caption_pools, load_image_dataset, training_batches

    dataset = load_image_dataset(name, resolution=SIDE, caption_bank=bank)
    dataset = dataset if keep else replace(dataset, kept=None)
    caption_fn, _ = caption_pools([dataset], 256, 0)
    return training_batches([dataset], None, caption_fn, BATCH, 0, random_flip="dihedral", num_workers=WORKERS)


def peer_batches(folder: Path):
    """Return the loader of Diffusers' examples/text_to_image/train_text_to_image.py, without its tokenizer."""
    import datasets
    from PIL import Image, ImageOps

    table = datasets.load_dataset("imagefolder", data_dir=str(folder / "imagefolder"))["train"]

    def transform(image):
        image = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
        image = ImageOps.mirror(image) if random.random() < 0.5 else image
        return torch.from_numpy(np.array(image).transpose(2, 0, 1)).float().div(255).sub(0.5).div(0.5)

    def preprocess(rows):
        return {"pixel_values": [transform(image) for image in rows["image"]], "captions": rows["text"]}

    def collate(rows):
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels.contiguous(), "captions": [row["captions"] for row in rows]}

    options = {"shuffle": True, "collate_fn": collate, "batch_size": BATCH, "num_workers": WORKERS, "drop_last": True}
    return iter(torch.utils.data.DataLoader(table.with_transform(preprocess), **options))


SIDES = {
    "npz": lambda folder: own_batches(str(folder / "bloodmnist_64.npz"), None),
    "parquet": lambda folder: own_batches(str(folder / "train.parquet"), "bloodmnist"),
    "imagefolder": lambda folder: own_batches(str(folder / "imagefolder"), None),
    "shards": lambda folder: own_batches(str(folder / "shards"), None),
    "datasets imagefolder": peer_batches,
    LONG: lambda folder: own_batches(str(folder / "shards"), None, keep=False),
}


def memory_of_tree() -> float:
    """Return the memory in MB of this process and its workers, pages that they share counted once (PSS)."""
    import psutil

    me = psutil.Process()
    return sum(each.memory_full_info().pss for each in (me, *me.children(recursive=True))) / 2**20


def run_side(side: str, folder: Path, num_batches: int) -> None:
    """Read one epoch, or --long samples, in this process, and print what was measured as JSON."""
    batches = SIDES[side](folder)
    next(batches)  # without the start of the workers
    started, memory = time.perf_counter(), []
    for number in range(num_batches - 1):
        batch = next(batches)
        assert batch["pixel_values"].shape == (BATCH, 3, SIDE, SIDE) and len(batch["captions"]) == BATCH
        if number % max(1, num_batches // 50) == 0:
            memory.append(memory_of_tree())
    rate = (num_batches - 1) * BATCH / (time.perf_counter() - started)
    settled = memory[len(memory) // 5 :]  # after the first fifth
    found = {"images_per_second": rate, "memory_mb": settled[0], "growth_mb": max(settled) - settled[0]}
    sys.stdout.write(f"\nRESULT {json.dumps(found)}\n")


def main() -> None:
    """Measure all sides in turn, print, and write to --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=8000)
    parser.add_argument("--long", type=int, default=0, help="samples of the run that watches memory; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="write the figures to this JSON file too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--num_batches", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args.side, args.folder, args.num_batches)
        return

    def in_turn(side, num_images):
        flags = "--side", side, "--folder", folder, "--num_batches", str(num_images // BATCH)
        done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return json.loads(done.stdout.split("RESULT ")[1])

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.num_images)
        turns = {side: [] for side in SIDES if side != LONG}
        for side in list(turns) * args.repeats:
            turns[side].append(in_turn(side, args.num_images))
        results = {
            side: sorted(found, key=lambda each: each["images_per_second"])[len(found) // 2]
            for side, found in turns.items()
        }
        if args.long:
            results[LONG] = {"samples": args.long, **in_turn(LONG, args.long)}
    facts = {"cores": os.cpu_count(), "torch": torch.__version__, "num_images": args.num_images}
    text = json.dumps({**facts, **results}, indent=1)
    sys.stdout.write(text + "\n")
    if args.output:
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
