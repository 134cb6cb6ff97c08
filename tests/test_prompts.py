"""Prompts of reward fine-tuning: where they come from, and in which order."""

import pytest

from visbio_diffusers.prompts import load_prompts, prompts_of_round


def test_a_bank_gives_as_many_prompts_of_every_subtype_and_holds_others_out():
    prompts = load_prompts("bloodmnist", size=10, heldout_size=3)
    assert len(prompts.train) == 11 * 10 and len(prompts.heldout) == 11 * 3
    assert not set(prompts.train) & set(prompts.heldout)
    assert load_prompts("bloodmnist", size=10, heldout_size=3) == prompts


def test_a_file_gives_its_distinct_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a monocyte\n\n a platelet \na monocyte\n", encoding="utf-8")
    assert load_prompts(str(file)) == (["a monocyte", "a platelet"], [])
    file.write_text(" \n\n")
    with pytest.raises(ValueError, match=r"prompts.txt holds no prompts: write one a line"):
        load_prompts(str(file))
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"prompts.txt is no text in UTF-8"):
        load_prompts(str(file))
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        load_prompts(str(tmp_path / "missing.txt"))


def test_each_pass_sees_all_prompts_once_in_an_order_of_its_own():
    prompts = [f"prompt {k}" for k in range(12)]
    passes = [
        [text for number in range(first, first + 3) for text in prompts_of_round(prompts, 4, number, 0)]
        for first in (0, 3)
    ]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(prompts) and passes[0] != passes[1]
    assert prompts_of_round(prompts, 4, 5, 0) == prompts_of_round(prompts, 4, 5, 0)
    assert len(prompts_of_round(prompts[:3], 8, 0, 0)) == 8  # fewer prompts than a round takes: some come again
