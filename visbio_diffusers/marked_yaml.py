"""YAML files whose mappings know their lines, so that a mistake of a user is answered with the place of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from visbio_diffusers.files import read_utf8


_MACRO = re.compile(r"<(\w+)>")


class Mapping(dict):
    """A mapping with the line of each key; the keys are texts, as they are written."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}


class Items(list):
    """A list with the line of each item."""

    def __init__(self) -> None:
        self.lines: list[int] = []


class _Loader(yaml.SafeLoader):
    """A safe loader of these two."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[Mapping]:
    found = Mapping()
    yield found  # before its content, as YAML's references need
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key.start_mark)
        if key.value in lines:
            problem = f"'{key.value}' stands in line {lines[key.value]} already: keep one of the two"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        lines[key.value] = line
    loader.flatten_mapping(node)
    for key, value in node.value:
        found[key.value] = loader.construct_object(value, deep=True)
        found.lines[key.value] = key.start_mark.line + 1


def _items(loader: _Loader, node: yaml.SequenceNode) -> Iterator[Items]:
    found = Items()
    yield found
    for item in node.value:
        found.append(loader.construct_object(item, deep=True))
        found.lines.append(item.start_mark.line + 1)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _items)


@dataclass(frozen=True)
class Entry:
    """A mapping of a YAML file.

    Args:
        path (`Path`): the file.
        owner (`str`): what the mapping is called in messages, such as "'monocyte'".
        line (`int`): where it begins.
        content (`Mapping`): what it holds.
    """

    path: Path
    owner: str
    line: int
    content: Mapping

    def error(self, message: str, key: str | None = None, item: int | None = None) -> ValueError:
        """Return an error at the line of `key` (of its item number `item`), or at that of the mapping itself."""
        line = self.content.lines.get(key, self.line)
        value = self.content.get(key)
        if item is not None and isinstance(value, Items):
            line = value.lines[item]
        return ValueError(f"{self.path} line {line}: {message}")

    def refuse_unknown(self, known: Sequence[str]) -> None:
        """Raise a ValueError, which names the nearest one, if there is a key that is not among `known`."""
        for key in self.content:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise self.error(f"{self.owner} knows no key `{key}`: did you mean `{nearest}`?", key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key."""
        return self.content.get(key, default)

    def entry(self, key: str, owner: str | None = None) -> Entry:
        """Return the mapping under a key, an empty one if the key is missing.

        Raises:
            ValueError: if it is something else.
        """
        value = self.content.get(key, Mapping())
        if not isinstance(value, Mapping):
            raise self.error(f"{owner or f'`{key}` of {self.owner}'} must be a mapping", key)
        return Entry(self.path, owner or f"`{key}` of {self.owner}", self.content.lines.get(key, self.line), value)

    def entries(self, key: str) -> dict[str, Entry]:
        """Return the mappings in the mapping under a key, by their names."""
        outer = self.entry(key)
        return {name: outer.entry(name, f"'{name}'") for name in outer.content}

    def texts(self, key: str, macros: dict[str, str] | None = None, required: bool = False) -> tuple[str, ...]:
        """Return the list of texts under a key, with each `<name>` in them replaced from `macros` if these are given.

        Raises:
            ValueError: if there is no list of texts, an unknown macro, or nothing although it is `required`.
        """
        values = self.content.get(key, Items())
        if not isinstance(values, Items):
            raise self.error(f"`{key}` of {self.owner} must be a list of texts", key)
        for place, text in enumerate(values):
            if not isinstance(text, str) or not text.strip():
                raise self.error(f"`{key}` of {self.owner} must be a list of texts, not '{text}'", key, place)
        if required and not values:
            raise self.error(f"{self.owner} needs a non-empty list of `{key}`", key)
        if macros is None:
            return tuple(values)
        for place, text in enumerate(values):
            for name in _MACRO.findall(text):
                if name not in macros:
                    raise self.error(f"<{name}> in `{key}` of {self.owner} is not among the `macros`", key, place)
        return tuple(_MACRO.sub(lambda match: macros[match.group(1)], text) for text in values)

    def all_texts(self) -> dict[str, str]:
        """Return all values, which must be texts."""
        for key, text in self.content.items():
            if not isinstance(text, str):
                raise self.error(f"`{key}` in {self.owner} must be a text", key)
        return dict(self.content)


def read_entry(path: Path, owner: str) -> Entry:
    """Return the mapping that a YAML file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML in UTF-8, holds something else, or twice the same key in a mapping.
    """
    try:
        content = yaml.load(read_utf8(path), _Loader)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(f"{path} line {error.problem_mark.line + 1}: {error.problem}") from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = read_utf8(path).count("\n", 0, error.position) + 1
        raise ValueError(f"{path} line {line}: holds the control character {error.character:#x}: remove it") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: {owner} must be a mapping of keys to values")
    return Entry(path, owner, 1, content)
