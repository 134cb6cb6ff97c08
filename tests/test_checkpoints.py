"""Checkpoints are whole or absent, damage is found and named, and nothing in them is unpickled."""

import logging
import os
import pickle
import resource
import shutil

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from visbio_diffusers import checkpoints


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(256, 256)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    checkpoints.register(accelerator, "counter", torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda s: 1.0))
    yield accelerator
    accelerator.free_memory()


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _cut(file):
    os.truncate(file, file.stat().st_size - 1)


def _halve(file):
    os.truncate(file, file.stat().st_size // 2)


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_save_restores_the_same_state_and_keeps_the_newest(accelerator, tmp_path):
    weight = accelerator._models[0].weight
    expected = weight.detach().clone()
    (tmp_path / ".tmp-checkpoint-0000001").mkdir()  # left by a run that was killed while it saved
    for step in (1, 2, 10):
        folder = checkpoints.save(accelerator, tmp_path, step, limit=2)
        checkpoints.verify(folder)
    assert _names(tmp_path) == ["checkpoint-0000002", "checkpoint-0000010"]
    assert checkpoints.latest(tmp_path) == folder == tmp_path / "checkpoint-0000010"
    nn.init.zeros_(weight)
    accelerator.load_state(str(folder))
    assert torch.equal(weight, expected)


def test_weights_of_another_memory_format_are_saved_and_restored(accelerator, tmp_path):
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    before = model.weight.clone()
    accelerator.prepare(model)
    checkpoints.unwrap_weights(accelerator)
    folder = checkpoints.save(accelerator, tmp_path, 1)
    torch.nn.init.zeros_(model.weight)
    accelerator.load_state(str(folder))
    assert torch.equal(model.weight, before)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_tensors_come_back_in_several_cpu_processes_too(accelerator, tmp_path, monkeypatch):
    average = nn.Linear(2, 2)
    checkpoints.register(accelerator, "average", average)
    folder, expected = checkpoints.save(accelerator, tmp_path, 1), average.weight.detach().clone()
    nn.init.zeros_(average.weight)
    monkeypatch.setattr(Accelerator, "device", torch.device("cpu", 0))  # what Accelerate calls it there
    accelerator.load_state(str(folder))
    assert torch.equal(average.weight, expected)


def test_saving_the_same_step_again_replaces_it(accelerator, tmp_path):
    _cut(checkpoints.save(accelerator, tmp_path, 1) / "model.safetensors")
    checkpoints.verify(checkpoints.save(accelerator, tmp_path, 1))
    assert _names(tmp_path) == ["checkpoint-0000001"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ("model.safetensors", "optimizer.bin") for damage in (_cut, _flip, os.remove)]
    + [("manifest.json", _halve), ("manifest.json", os.remove)],
)
def test_damage_is_named_and_the_checkpoint_before_is_taken(name, damage, accelerator, tmp_path, caplog):
    good = checkpoints.save(accelerator, tmp_path, 1)
    bad = checkpoints.save(accelerator, tmp_path, 2)
    damage(bad / name)
    with pytest.raises(ValueError, match=rf"checkpoint-0000002 is damaged: .*{name}"):
        checkpoints.verify(bad)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.to_resume(tmp_path, "latest") == good
    assert "checkpoint-0000002 is damaged" in caplog.text
    assert _names(tmp_path) == ["checkpoint-0000001", "damaged-checkpoint-0000002"]


def test_what_can_be_resumed(accelerator, tmp_path):
    assert checkpoints.to_resume(tmp_path / "absent", "") is None
    assert checkpoints.to_resume(tmp_path / "absent", "latest") is None
    first = checkpoints.save(accelerator, tmp_path, 1)
    assert checkpoints.to_resume(tmp_path, str(first)) == checkpoints.to_resume(tmp_path, first.name) == first
    with pytest.raises(ValueError, match="add --resume_from_checkpoint latest, or choose another --output_dir"):
        checkpoints.to_resume(tmp_path, "")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder .*checkpoint-0000007"):
        checkpoints.to_resume(tmp_path, "checkpoint-0000007")
    with pytest.raises(ValueError, match="not named like a checkpoint"):
        checkpoints.to_resume(tmp_path, "last")
    second = checkpoints.save(accelerator, tmp_path, 2)
    with pytest.raises(ValueError, match="checkpoint-0000002 is newer than .*checkpoint-0000001"):
        checkpoints.to_resume(tmp_path, str(first))
    for folder in (first, second):
        _cut(folder / "optimizer.bin")
    with pytest.raises(ValueError, match="no checkpoint in .* is intact"):
        checkpoints.to_resume(tmp_path, "latest")


@pytest.mark.parametrize("room", [2**10, 2**18], ids=["for no file", "for the weights but not the optimizer"])
def test_a_full_disk_leaves_the_earlier_checkpoints(room, accelerator, tmp_path):
    checkpoints.save(accelerator, tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room += (tmp_path / "checkpoint-0000001" / "model.safetensors").stat().st_size if room > 2**10 else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*checkpoint-0000002: .*earlier checkpoints") as error_info:
            checkpoints.save(accelerator, tmp_path, 2, limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error_info.value)
    assert _names(tmp_path) == ["checkpoint-0000001"]
    checkpoints.verify(tmp_path / "checkpoint-0000001")


def test_an_unusable_folder_is_named(accelerator, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*file/checkpoint-0000001: "):
        checkpoints.save(accelerator, tmp_path / "file", 1)


class _Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("name", ["optimizer.bin", "counter.pt", "random_states_0.pkl"])
def test_loading_executes_nothing(name, accelerator, tmp_path):
    folder = checkpoints.save(accelerator, tmp_path, 1)
    trap = tmp_path / "sprung"
    torch.save({"state": _Trap(trap)}, folder / name)
    os.remove(folder / checkpoints.MANIFEST)
    checkpoints.seal(folder, tmp_path / "checkpoint-0000002")  # a manifest that fits the altered file
    checkpoints.verify(tmp_path / "checkpoint-0000002")
    if name == "random_states_0.pkl":  # Accelerate passes over random states that it cannot read
        accelerator.load_state(str(tmp_path / "checkpoint-0000002"))
    else:
        with pytest.raises(pickle.UnpicklingError):
            accelerator.load_state(str(tmp_path / "checkpoint-0000002"))
    assert not trap.exists()


def test_a_state_that_was_not_saved_is_named(accelerator, tmp_path):
    folder = checkpoints.save(accelerator, tmp_path, 1)
    checkpoints.register(
        accelerator, "ema", torch.optim.lr_scheduler.LambdaLR(accelerator._optimizers[0], lambda s: 1.0)
    )
    with pytest.raises(FileNotFoundError, match="holds no ema.pt"):
        accelerator.load_state(str(folder))


def test_log_is_cut_to_whole_lines_of_the_resumed_step(tmp_path):
    log = tmp_path / "loss.jsonl"
    checkpoints.truncate_log(log, 2)  # nothing to cut
    checkpoints.append_log(log, [f'{{"step": {step}}}\n' for step in (1, 2, 3)] + ['{"st'])
    checkpoints.truncate_log(log, 5)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    checkpoints.truncate_log(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match="cannot write .*loss.jsonl"):
        checkpoints.append_log(log, ["{}\n"])
