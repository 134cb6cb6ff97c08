"""How the words of a class become a phrase: a synonym, a description, or a composition of single attributes."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


_ALTERNATIVES = re.compile(r"\(([^()]*\|[^()]*)\)")
_ARTICLE = re.compile(r"\b([Aa])n? (?=([\w-]+))")
_LEADING_ARTICLE = re.compile(r"^(?:an?|the) ")
_WORD_STEM = re.compile(r"\b[a-z]{5}")
_SIZE_WORDS = re.compile(r"\b(?:size|diameter|width|large|big|small|tiny|minute)")
_YOO_SOUND = re.compile(r"u(?:ni(?!n)|s[eu]|t[ei]|r[eio])|u-|eu|once|one\b")
_SPELLED_VOWELS = frozenset("AEFHILMNORSX")
_AMERICAN = (
    ("grey", "gray"),
    ("colour", "color"),
    ("leucocyte", "leukocyte"),
    ("leukaemi", "leukemi"),
    ("anaemi", "anemi"),
    ("bandaemia", "bandemia"),
    ("haem", "hem"),
    ("oedema", "edema"),
    ("centre", "center"),
    ("characterised", "characterized"),
    ("recognis", "recogniz"),
    ("analyser", "analyzer"),
    ("chequerboard", "checkerboard"),
    ("tumour", "tumor"),
    ("fibre", "fiber"),
)
_VERBS = (
    *("with", "with", "with", "with", "showing", "having", "displaying", "exhibiting"),
    *("that has", "which has", "that shows", "characterised by", "recognised by", "marked by", "featuring"),
)
_ATTRIBUTE_COUNTS = (1, 1, 1, 2, 2, 2, 2, 3, 3, 4)


@dataclass(frozen=True)
class ClassWords:
    """Everything that may be said about one class or subtype.

    Args:
        name (`str`): the class as the data set calls it.
        prompt (`str`): its name in a prompt, in the singular.
        synonyms, descriptions (`tuple[str, ...]`): names and full descriptions, noun phrases both.
        countable (`bool`): whether synonyms and nouns take "a" or "an".
        nouns (`tuple[str, ...]`): more general names, used only beside a distinctive attribute.
        sizes (`tuple[str, ...]`): adjectives that may stand before a noun.
        key, clauses (`dict[str, tuple[str, ...]]`): distinctive attributes by group, as noun phrases ("a folded
            nucleus") and as relative clauses ("whose nucleus is folded").
        attributes (`dict[str, tuple[str, ...]]`): all noun phrases by group, those of `key` included.
        heldout_descriptions (`tuple[str, ...]`): descriptions kept for evaluation.
        subtypes (`dict[str, ClassWords]`): the words of the subtypes.
    """

    name: str
    prompt: str
    synonyms: tuple[str, ...]
    descriptions: tuple[str, ...]
    countable: bool = False
    nouns: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    key: dict[str, tuple[str, ...]] = field(default_factory=dict)
    clauses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    heldout_descriptions: tuple[str, ...] = ()
    subtypes: dict[str, "ClassWords"] = field(default_factory=dict)

    @cached_property
    def folded_heldout(self) -> tuple[str, ...]:
        """The held-out descriptions in the form of `fold`."""
        return tuple(map(fold, self.heldout_descriptions))

    def noun_phrase(self, noun: str) -> str:
        """Return `noun` with an article where the class is countable."""
        return f"a {noun}" if self.countable else noun

    def choose(self, rng: np.random.Generator, subtype: str | None, subtype_share: float = 0.5) -> "ClassWords":
        """Return these words or, in `subtype_share` of the cases, those of `subtype` (of any where it is None).

        Raises:
            ValueError: for an unknown subtype.
        """
        if subtype is None:
            candidates = list(self.subtypes.values())
        elif subtype in (self.name, self.prompt):
            candidates = []
        elif subtype in self.subtypes:
            candidates = [self.subtypes[subtype]]
        else:
            nearest = difflib.get_close_matches(subtype, (*self.subtypes, self.prompt), n=1, cutoff=0.0)[0]
            raise ValueError(f"'{self.name}' has no subtype '{subtype}': did you mean '{nearest}'?")
        return pick(candidates, rng) if candidates and rng.random() < subtype_share else self

    def phrase(self, rng: np.random.Generator) -> tuple[str, bool]:
        """Return a phrase about the class and whether it is loose, that is, more or other than a noun phrase."""
        kind = rng.random()
        if self.attributes and kind < 0.6:
            return _compose(self, rng)
        if kind < (0.8 if self.attributes else 0.5):
            noun = realise(pick(self.synonyms, rng), rng)
            bare = rng.random() < 0.3
            return (noun if bare else self.noun_phrase(noun)), bare
        return _describe(self, rng)


def pick(options: Sequence, rng: np.random.Generator):
    """Return one of `options`; several times faster than `rng.choice`."""
    return options[int(rng.random() * len(options))]


def realise(text: str, rng: np.random.Generator) -> str:
    """Replace each `(a|b)` by one of its alternatives, the inner ones first."""
    while "|" in text:
        text = _ALTERNATIVES.sub(lambda match: pick(match.group(1).split("|"), rng), text)
    return text.replace("  ", " ").strip()


def join(parts: list[str], rng: np.random.Generator) -> str:
    """Join `parts` as a list in prose."""
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + pick((" and ", " and ", ", and ", ", ", " plus "), rng) + parts[-1]


def fit_articles(text: str) -> str:
    """Set "a" or "an" by the sound of the next word."""
    return _ARTICLE.sub(lambda match: match.group(1) + ("n " if _starts_with_vowel(match.group(2)) else " "), text)


def american(text: str) -> str:
    """Return `text` in American spelling."""
    for here, there in _AMERICAN:
        text = text.replace(here, there)
    return text


def fold(text: str) -> str:
    """Return a text in the form in which held-out and training wordings are compared."""
    return american(text.lower())


def _starts_with_vowel(word: str) -> bool:
    head = word.split("-")[0]
    letters = head[1:] if head.startswith("n") and head[1:].isupper() else head  # nRBC
    if letters.isalpha() and letters.isupper() and (len(letters) <= 3 or not set(letters) & set("AEIOU")):
        return head[0].upper() in _SPELLED_VOWELS
    return head[0].lower() in "aeiou8" and not _YOO_SOUND.match(word.lower())


def _describe(words: ClassWords, rng: np.random.Generator) -> tuple[str, bool]:
    """Return a full description, now and then beside a name of the class."""
    text = realise(pick(words.descriptions, rng), rng)
    noun = realise(pick(words.synonyms, rng), rng)
    form = rng.random()
    if form < 0.7 or any(name in text for name in (words.prompt, noun)):
        return text, False
    if form < 0.8:
        return f"{words.noun_phrase(noun)}, {text}", False
    return (f"{noun}: {text}" if form < 0.9 else f"{text}: {noun}"), True


def _compose(words: ClassWords, rng: np.random.Generator) -> tuple[str, bool]:
    """Return a noun with attributes; a general noun always gets a distinctive one."""
    general = bool(words.nouns) and bool(words.key) and rng.random() < 0.5
    noun = realise(pick(words.nouns if general else words.synonyms, rng), rng)
    clause = ""
    if words.clauses and rng.random() < 0.3:
        clause = realise(pick(pick(list(words.clauses.values()), rng), rng), rng)
    attributes = _draw_attributes(words, rng, clause, distinctive=general)
    subject = noun
    if words.sizes and rng.random() < 0.35 and not _SIZE_WORDS.search(" ".join((noun, clause, *attributes))):
        subject = f"{pick(words.sizes, rng)} {noun}"
    subject = words.noun_phrase(subject)
    if clause:
        return _with_clause(subject, clause, attributes, rng)
    return _with_attributes(subject, noun, attributes, general, rng)


def _draw_attributes(words: ClassWords, rng: np.random.Generator, clause: str, distinctive: bool) -> list[str]:
    """Return one to four attributes (none to two beside a clause), no two of which speak of the same thing."""
    count = pick((0, 1, 2) if clause else _ATTRIBUTE_COUNTS, rng)
    groups = list(words.attributes)
    sources = [words.attributes[groups[i]] for i in rng.permutation(len(groups))]
    if distinctive and not clause:
        sources.insert(0, words.key[pick(list(words.key), rng)])
    drawn: list[str] = []
    taken = set(_WORD_STEM.findall(clause))
    for source in sources:
        if len(drawn) == count:
            break
        text = realise(pick(source, rng), rng)
        stems = set(_WORD_STEM.findall(text))
        if not stems & taken:  # "nucle", "granu", "cytop": never the same part twice
            drawn.append(text)
            taken |= stems
    return [drawn[i] for i in rng.permutation(len(drawn))]


def _with_attributes(
    subject: str, noun: str, attributes: list[str], distinctive: bool, rng: np.random.Generator
) -> tuple[str, bool]:
    form = int(rng.random() * (14 if distinctive else 12))  # the last two forms do without a noun
    listed = join(attributes, rng)
    if form < 6:
        return f"{subject} {pick(_VERBS, rng)} {listed}", False
    noun = _LEADING_ARTICLE.sub("", noun)
    bare = ", ".join(_LEADING_ARTICLE.sub("", text) for text in attributes)
    loose = (
        f"{bare}: {noun}",
        f"{noun}, {bare}",
        f"{noun}: {bare}",
        f"{bare}, {noun}",
        f"{pick(('this', 'the'), rng)} {noun} {pick(('has', 'shows', 'displays'), rng)} {listed}",
        f"{subject}. {pick(('it has', 'it shows', 'note', 'seen are', 'there is'), rng)} {listed}",
        bare,
        bare,
    )
    return loose[form - 6], True


def _with_clause(subject: str, clause: str, attributes: list[str], rng: np.random.Generator) -> tuple[str, bool]:
    form = rng.random()
    if form < 0.3 and clause.startswith(("whose ", "that ")):  # the clause as a sentence of its own
        sentence = re.sub("^that ", "it ", clause).replace("whose ", pick(("its ", "the "), rng))
        if form < 0.1 and clause.startswith("whose "):
            return sentence, True
        return f"{subject}{pick((': ', '; ', ', ', '. '), rng)}{sentence}", True
    if not attributes:
        return f"{subject} {clause}", False
    if form < 0.5:
        return f"{subject} with {join(attributes, rng)}, {clause}", False
    return f"{subject} {clause}, {pick(_VERBS[:8], rng)} {join(attributes, rng)}", False
