"""Captions as tensors: padding, the mask, and a cache on disk that can be neither stale nor half written."""

import os
import threading

import pytest
import torch

from visbio_diffusers import text
from visbio_diffusers.text import EmbeddingCache, encode_text, max_tokens, text_mask


CAPTIONS = ["a monocyte", "", "a segmented neutrophil, Wright-Giemsa stain", "pink"]


def test_rows_of_zeros_are_padding(tiny_text):
    encoder, tokenizer = tiny_text
    states = encode_text(encoder, tokenizer, CAPTIONS)
    lengths = [len(tokenizer(caption)["input_ids"]) for caption in CAPTIONS]
    assert states.shape == (4, max(lengths), encoder.config.hidden_size) and not states.requires_grad
    mask = text_mask(states)
    assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == lengths
    assert lengths[1] == 2  # the empty text still has [CLS] and [SEP]
    assert (states[~mask] == 0).all()
    for row, caption in enumerate(CAPTIONS):  # company in the batch does not matter
        alone = encode_text(encoder, tokenizer, [caption])[0]
        torch.testing.assert_close(states[row, : lengths[row]], alone, atol=1e-5, rtol=1e-5)


def test_equals_the_encoder_called_directly(tiny_text):
    encoder, tokenizer = tiny_text
    with torch.no_grad():
        expected = encoder(**tokenizer("a monocyte", return_tensors="pt")).last_hidden_state
    assert torch.equal(encode_text(encoder, tokenizer, ["a monocyte"]), expected)


def test_long_texts_are_cut_to_what_encoder_and_tokenizer_take(tiny_text):
    encoder, tokenizer = tiny_text
    assert max_tokens(tokenizer, encoder) == min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokenizer.model_max_length = int(1e30)  # of a tokenizer that does not know
    longest = encoder.config.max_position_embeddings
    assert encode_text(encoder, tokenizer, ["cell " * 200]).shape[1] == longest
    tokenizer.model_max_length = 9
    assert encode_text(encoder, tokenizer, ["cell " * 200]).shape[1] == 9


def test_cache_gives_what_encoding_gives(tiny_text, tmp_path):
    cache = EmbeddingCache(CAPTIONS, *tiny_text, tmp_path, batch_size=3)
    asked = [CAPTIONS[2], CAPTIONS[1], CAPTIONS[2], CAPTIONS[0]]
    states, mask = cache(asked)
    expected = encode_text(*tiny_text, asked)
    assert states.dtype == torch.float32 and mask.dtype == torch.bool
    torch.testing.assert_close(states, expected, atol=1e-3, rtol=1e-3)  # kept in fp16
    assert torch.equal(mask, text_mask(expected))
    assert (states[~mask] == 0).all()
    assert cache(["pink"])[0].shape[1] == 6  # padded to the longest of those asked for
    with pytest.raises(KeyError, match="a platelet"):
        cache(["a platelet"])


def test_resident_embeddings_are_those_of_the_cache_in_batches_of_one_shape(tiny_text, tmp_path):
    cache = EmbeddingCache(CAPTIONS, *tiny_text, tmp_path, batch_size=3)
    resident = cache.resident(torch.device("cpu"))
    for asked in ([CAPTIONS[2], CAPTIONS[1], CAPTIONS[2], CAPTIONS[0]], ["", "pink"]):
        (states, mask), (expected, expected_mask) = resident(resident.rows(asked)), cache(asked)
        longest = expected.shape[1]
        assert torch.equal(states[:, :longest], expected) and torch.equal(mask[:, :longest], expected_mask)
        assert states.shape[1] % 8 == 0 and not states[:, longest:].any() and not mask[:, longest:].any()
    assert cache.nbytes == resident.tokens.nbytes


def test_cache_is_written_once_and_read_again(tiny_text, tmp_path, monkeypatch):
    first = EmbeddingCache(CAPTIONS, *tiny_text, tmp_path / "deep" / "folder")
    os.utime(first.paths[0], (1, 1))
    monkeypatch.setattr(text, "encode_text", None)  # a second encoding would fail
    second = EmbeddingCache(CAPTIONS, *tiny_text, tmp_path / "deep" / "folder")
    assert second.paths[0] == first.paths[0] and first.paths[0].stat().st_mtime == 1
    assert [path.name for path in first.paths[0].parent.iterdir()] == [first.paths[0].name]
    assert torch.equal(second(CAPTIONS)[0], first(CAPTIONS)[0])


def test_other_weights_captions_or_tokens_make_another_file(tiny_text, tmp_path):
    encoder, tokenizer = tiny_text
    paths = [EmbeddingCache(CAPTIONS, encoder, tokenizer, tmp_path).paths[0]]
    paths.append(EmbeddingCache(CAPTIONS[:3], encoder, tokenizer, tmp_path).paths[0])
    paths.append(EmbeddingCache(CAPTIONS[::-1], encoder, tokenizer, tmp_path).paths[0])
    with torch.no_grad():
        encoder.encoder.layer[0].output.dense.bias[3] += 1e-3
    paths.append(EmbeddingCache(CAPTIONS, encoder, tokenizer, tmp_path).paths[0])
    tokenizer.add_tokens(["neutrophil"])
    encoder.resize_token_embeddings(len(tokenizer))
    paths.append(EmbeddingCache(CAPTIONS, encoder, tokenizer, tmp_path).paths[0])
    assert len(set(paths)) == len(list(tmp_path.iterdir())) == 5


def test_what_shortens_texts_makes_another_file(tiny_text, tmp_path):
    encoder, tokenizer = tiny_text
    whole = EmbeddingCache(CAPTIONS, encoder, tokenizer, tmp_path)
    tokenizer.model_max_length = 9
    cut = EmbeddingCache(CAPTIONS, encoder, tokenizer, tmp_path)
    assert cut(CAPTIONS)[0].shape[1] == 9 < whole(CAPTIONS)[0].shape[1]


def test_the_same_caption_twice_is_refused(tiny_text, tmp_path):
    with pytest.raises(ValueError, match="must be distinct"):
        EmbeddingCache(["pink", "blue", "pink"], *tiny_text, tmp_path)


def test_a_failed_write_leaves_nothing(tiny_text, tmp_path, monkeypatch):
    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        EmbeddingCache(CAPTIONS, *tiny_text, tmp_path)
    assert not list(tmp_path.iterdir())


def test_processes_share_the_encoding(tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PART", 2)
    barrier, found = threading.Barrier(2), {}

    def process(rank):
        share = {"rank": rank, "world_size": 2, "wait": barrier.wait}
        found[rank] = EmbeddingCache(CAPTIONS, *tiny_text, tmp_path / "shared", 1, **share)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    alone = EmbeddingCache(CAPTIONS, *tiny_text, tmp_path / "alone", 1)
    assert len(alone.paths) == 2 and sorted(os.listdir(tmp_path / "shared")) == sorted(os.listdir(tmp_path / "alone"))
    for cache in found.values():
        assert torch.equal(cache(CAPTIONS)[0], alone(CAPTIONS)[0])
