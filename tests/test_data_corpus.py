"""Running text: files, sentences, and sentences about other things."""

import pytest

from visbio_diffusers.data.corpus import foreign_sentences, read_corpus, split_sentences


def test_files_of_each_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"abstract": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "b.csv").write_text("caption\none\n")
    (tmp_path / "c.txt").write_text("one\n\ntwo\n")
    assert [read_corpus(str(tmp_path / name)) for name in ("a.jsonl", "b.csv", "c.txt")] == [
        ["one", "two"],
        ["one"],
        ["one", "two"],
    ]
    with pytest.raises(FileNotFoundError, match="no corpus file"):
        read_corpus(str(tmp_path / "gone.txt"))
    wrong = {"d.jsonl": ("\n[]\n", "d.jsonl line 2 is no JSON object"), "e.csv": ("a\n1\n", "holds no text")}
    for name, (content, message) in wrong.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_corpus(str(tmp_path / name))


def test_sentences_end_before_a_capital_a_digit_or_a_bracket():
    text = "It is (p < 0.05) so. We saw 3.5 cells, e.g. red ones! Are they? 12 were. (None of others.)"
    assert split_sentences(text) == [
        "It is (p < 0.05) so.", "We saw 3.5 cells, e.g. red ones!", "Are they?", "12 were.", "(None of others.)"
    ]  # fmt: skip
    assert split_sentences("  ") == []


def test_sentences_with_a_telling_word_are_no_foreign_ones():
    captions = ["a monocyte with granules", "an image of a monocyte", "the eosinophil", "a large eosinophil"]
    sentences = ["Monocytes were counted.", "The patients were old.", "A large study.", *["Large trials failed."] * 17]
    assert foreign_sentences(sentences, captions) == sentences[1:]
