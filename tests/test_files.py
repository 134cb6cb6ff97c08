"""A file is replaced whole, or stays as it was."""

import os

import pytest
import torch
from safetensors.torch import save_file

from visbio_diffusers.files import whole_file


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with whole_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyError), whole_file(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.txt: No space left on device; make room"):
        with whole_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("")
    assert not list(tmp_path.iterdir())


def test_an_error_of_safetensors_is_one_of_writing(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: "):
        with whole_file(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary / "folder that is not there")
