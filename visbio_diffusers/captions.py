"""Captions for labelled images: a label becomes one of many thousand wordings of its class.

A caption is a template ("a photomicrograph of {}") filled with a phrase: a synonym of the class, a full description,
or a composition of single attributes. The words live in YAML files, `caption_banks/*.yaml` or a user's own:

    classes:
      monocyte:
        synonyms: [a monocyte]
        descriptions: [a large cell with a kidney-shaped nucleus]
    templates: ["{}", "a micrograph of {}"]

All other fields (`bloodmnist.yaml` uses each of them but those of multi-label sets) are optional. In synonyms,
descriptions and attributes `(a|b)` stands for one of its alternatives and `<name>` for an entry of `macros`.
"""

import difflib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from visbio_diffusers.marked_yaml import Entry, read_entry
from visbio_diffusers.wording import ClassWords, american, fit_articles, fold, join, pick, realise


BANK_FOLDER = Path(__file__).parent / "caption_banks"

_RESOLUTION = re.compile(r"_(28|64|128|224)$")
_LOOSE_TEMPLATE = re.compile(r"(^|[:;,.] )\{\}([:;,.]|$)")
_BANK_KEYS = (
    *("name", "license", "source", "plain", "multi_label", "countable", "nouns", "macros"),
    *("templates", "heldout_templates", "classes", "no_finding"),
)
_WORD_KEYS = (
    *("prompt", "synonyms", "descriptions", "countable", "nouns", "sizes", "key", "minor", "clauses"),
    *("heldout_descriptions", "subtypes"),
)
_STALE_DRAWS = 400  # a pool is exhausted after so many draws in a row that brought nothing new


@dataclass(frozen=True)
class CaptionBank:
    """The captions of a data set.

    Args:
        name (`str`): the data set, or the file name of a user's own bank.
        classes (`tuple[ClassWords, ...]`): one entry per class in label order.
        templates, heldout_templates (`tuple[str, ...]`): wordings around a phrase, which takes the place of "{}".
        plain (`str`): the template of the plainest prompt.
        no_finding (`ClassWords`, *optional*): of a multi-label set, the words for a label vector of zeros.
        license, source (`str`): of the data the classes belong to.
    """

    name: str
    classes: tuple[ClassWords, ...]
    templates: tuple[str, ...]
    heldout_templates: tuple[str, ...] = ()
    plain: str = "an image of {}"
    no_finding: ClassWords | None = None
    license: str = ""
    source: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in label order."""
        return tuple(words.name for words in self.classes)

    def caption(
        self,
        label: int | Sequence[int],
        rng: np.random.Generator,
        subtype: str | None = None,
        subtype_share: float = 0.5,
    ) -> str:
        """Draw one training caption.

        Args:
            label (`int` or 0/1 vector of shape `(num_classes,)`): the class, or the findings of a multi-label set.
            rng (`np.random.Generator`): the source of all choices.
            subtype (`str`, *optional*): part of the captions then use the subtype's own words, the rest those of the
                class; None allows every subtype, the name of the class itself none.
            subtype_share (`float`): that part.

        Raises:
            ValueError: for a label outside the bank or an unknown subtype.
        """
        findings = self._findings(label)
        while True:
            if len(findings) == 1:
                phrase, loose = findings[0].choose(rng, subtype, subtype_share).phrase(rng)
            else:
                order = rng.permutation(len(findings))
                phrase, loose = join([realise(pick(findings[i].synonyms, rng), rng) for i in order], rng), False
            text = fit_articles(pick(self._loose_templates if loose else self.templates, rng).replace("{}", phrase))
            if rng.random() < 0.5:
                text = american(text)
            folded = fold(text)
            if not any(heldout in folded for words in findings for heldout in words.folded_heldout):
                return text

    def pool(
        self,
        label: int | Sequence[int],
        size: int,
        seed: int,
        subtype: str | None = None,
        subtype_share: float = 0.5,
    ) -> list[str]:
        """Draw `size` distinct training captions, or as many as the bank has; equal arguments give equal lists."""
        labels = np.atleast_1d(label).astype(int)
        rng = np.random.default_rng([seed, zlib.crc32((subtype or "").encode()), *labels])
        captions: dict[str, None] = {}
        stale = 0
        while len(captions) < size and stale < _STALE_DRAWS:
            caption = self.caption(label, rng, subtype, subtype_share)
            stale = stale + 1 if caption in captions else 0
            captions[caption] = None
        return list(captions)

    def plain_caption(self, label: int | Sequence[int], subtype: str | None = None) -> str:
        """Return the plainest prompt, such as "a microscopy image of a monocyte", or that of a subtype of a class."""
        findings = self._findings(label)
        names = [
            words.noun_phrase(words.prompt) for words in ([findings[0].subtypes[subtype]] if subtype else findings)
        ]
        return fit_articles(self.plain.replace("{}", _enumerate(names)))

    def heldout_captions(self, label: int | Sequence[int]) -> list[str]:
        """Return every held-out description in every held-out template, the first ones each of another description."""
        rows = zip(*(words.heldout_descriptions for words in self._findings(label)), strict=False)
        phrases = [_enumerate(row) for row in rows]
        templates = self.heldout_templates or ("{}",)
        return [
            fit_articles(templates[(index + shift) % len(templates)].replace("{}", phrase))
            for shift in range(len(templates))
            for index, phrase in enumerate(phrases)
        ]

    @cached_property
    def _loose_templates(self) -> tuple[str, ...]:
        """Templates that set the phrase off by punctuation, so that it need not be a noun phrase."""
        return tuple(text for text in self.templates if _LOOSE_TEMPLATE.search(text)) or ("{}",)

    def _findings(self, label: int | Sequence[int]) -> list[ClassWords]:
        """Return the words of the class, or of all findings of a multi-label vector."""
        last = len(self.classes) - 1
        if np.ndim(label) == 0:
            if not 0 <= int(label) <= last:
                raise ValueError(f"label {label} is not in the caption bank '{self.name}': its labels are 0 to {last}")
            return [self.classes[int(label)]]
        if self.no_finding is None:
            raise ValueError(f"the caption bank '{self.name}' has one class per image: give the label as an integer")
        if np.shape(label) != (last + 1,) or not np.isin(label, (0, 1)).all():
            raise ValueError(f"the caption bank '{self.name}' needs a 0/1 vector of length {last + 1}, not {label}")
        return [words for words, present in zip(self.classes, label, strict=True) if present] or [self.no_finding]


def load_bank(name_or_path: str | Path) -> CaptionBank:
    """Load a caption bank by the name of a MedMNIST set (`bloodmnist`, `bloodmnist_64`) or from a YAML file.

    Raises:
        ValueError: for an unknown name (with the nearest one) or a malformed file (with the line).
        FileNotFoundError: for a path to a YAML file that does not exist.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        name = _RESOLUTION.sub("", str(name_or_path))
        path = BANK_FOLDER / f"{name}.yaml"
        if name not in available_banks():
            nearest = difflib.get_close_matches(name, available_banks(), n=1, cutoff=0.0)[0]
            raise ValueError(f"no caption bank '{name}': did you mean '{nearest}'? A bank of your own is a .yaml file")
    return _build_bank(path, read_entry(path, "the bank"))


def available_banks() -> tuple[str, ...]:
    """Return the names of the banks that come with the package."""
    return tuple(sorted(path.stem for path in BANK_FOLDER.glob("*.yaml")))


def _build_bank(path: Path, bank: Entry) -> CaptionBank:
    bank.refuse_unknown(_BANK_KEYS)
    macros = bank.entry("macros").all_texts()
    templates = bank.texts("templates", required=True)
    heldout_templates = bank.texts("heldout_templates")
    plain = str(bank.get("plain", "an image of {}"))
    for key, texts in (("templates", templates), ("heldout_templates", heldout_templates), ("plain", (plain,))):
        for index, template in enumerate(texts):
            if template.count("{}") != 1:
                raise bank.error(f"the template '{template}' must contain {{}} once", key, index)
    for index, template in enumerate(heldout_templates):
        if template in templates:
            raise bank.error(f"'{template}' stands in `templates` too", "heldout_templates", index)
    classes = bank.entries("classes")
    if not classes:
        raise bank.error("`classes` must map each class name to its `synonyms` and `descriptions`", "classes")
    return CaptionBank(
        name=str(bank.get("name", path.stem)),
        classes=tuple(_build_words(bank, name, entry, macros) for name, entry in classes.items()),
        templates=templates,
        heldout_templates=heldout_templates,
        plain=plain,
        no_finding=_build_words(bank, "no_finding", bank.entry("no_finding"), macros)
        if bank.get("multi_label")
        else None,
        license=str(bank.get("license", "")),
        source=str(bank.get("source", "")),
    )


def _build_words(
    bank: Entry, name: str, entry: Entry, macros: dict[str, str], parent: ClassWords | None = None
) -> ClassWords:
    """Build the words of a class, or of a subtype of `parent`, which lends it what it leaves unsaid."""
    entry.refuse_unknown(_WORD_KEYS)

    def texts(key: str, required: bool = False) -> tuple[str, ...]:
        return entry.texts(key, macros, required)

    def groups(key: str) -> dict[str, tuple[str, ...]]:
        group = entry.entry(key)
        return {name: group.texts(name, macros, required=True) for name in group.content}

    key, attributes = groups("key"), groups("minor")
    for group, values in key.items():
        attributes[group] = values + attributes.get(group, ())
    general_nouns = parent.synonyms + parent.nouns if parent else bank.texts("nouns", macros)
    words = ClassWords(
        name=name,
        prompt=str(entry.get("prompt", name)),
        synonyms=texts("synonyms", required=True),
        descriptions=texts("descriptions", required=True),
        countable=bool(entry.get("countable", bank.get("countable", False))),
        nouns=texts("nouns") or general_nouns,
        sizes=texts("sizes"),
        key=key,
        clauses=groups("clauses"),
        attributes={**parent.attributes, **attributes} if parent else attributes,
        heldout_descriptions=texts("heldout_descriptions"),
    )
    for index, heldout in enumerate(words.folded_heldout):
        if any(heldout in fold(text) for text in words.synonyms + words.descriptions):
            message = f"the held-out description '{heldout}' is among the training words of '{name}'"
            raise entry.error(message, "heldout_descriptions", index)
    for subtype, subentry in entry.entries("subtypes").items():
        words.subtypes[subtype] = _build_words(bank, subtype, subentry, macros, parent=words)
    return words


def _enumerate(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
