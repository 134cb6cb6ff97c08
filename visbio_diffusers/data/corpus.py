"""Files of running text: read, cut into sentences, and those told apart that speak of other things than captions."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9(])")
_WORD = re.compile(r"[a-z]{4,}")


def read_corpus(path: str) -> list[str]:
    """Return the texts of a .jsonl (key abstract or text), .csv (column caption or text) or .txt file (one a line).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no text, or a line that is no JSON.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no corpus file {path}")
    if file.suffix == ".jsonl":
        texts = [row.get("abstract") or row.get("text") or "" for row in read_json_lines(file).values()]
    elif file.suffix == ".csv":
        texts = [row.get("caption") or row.get("text") or "" for row in csv.DictReader(file.open(encoding="utf-8"))]
    else:
        texts = file.read_text(encoding="utf-8").splitlines()
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text: .jsonl needs a key `abstract` or `text`, .csv a column `caption`")
    return texts


def read_json_lines(path: Path) -> dict[int, dict]:
    """Return the objects of a file of JSON lines by the number of their line; empty lines are passed over.

    Raises:
        ValueError: naming the first line that holds no JSON object.
    """
    rows = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is no JSON object: mend or remove it")
            rows[number] = row
    return rows


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text: they end with a full stop, before a capital letter, a digit or a bracket."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


def foreign_sentences(sentences: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Return the sentences without a telling word: one that captions use 5 times as often as the sentences do."""
    said, used = _shares(captions), _shares(sentences)
    telling = {word for word, share in said.items() if share > max(5 * used.get(word, 0.0), 0.001)}
    return [sentence for sentence in sentences if not telling & _words(sentence)]


def _words(text: str) -> set[str]:
    return {word.removesuffix("s") for word in _WORD.findall(text.lower())}


def _shares(texts: Sequence[str]) -> dict[str, float]:
    counts = Counter(word for text in texts for word in _words(text))
    return {word: count / len(texts) for word, count in counts.items()}
