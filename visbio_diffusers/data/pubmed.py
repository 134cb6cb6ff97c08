"""Text of PubMed from its files: titles and abstracts of articles, and the figures of PMC articles with captions.

MEDLINE text is read by Biopython. XML is read by the standard library, article by article: Bio.Entrez.parse refuses
article sets and Bio.Entrez.read holds a whole one in memory; pubmed_parser loses what markup within markup says, books
and licences, and takes compressed sets alone. No entity of another file is opened, and expat bounds what those of the
file itself may grow to.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from xml.etree import ElementTree

from tqdm.auto import tqdm

from visbio_diffusers.files import whole_file


if TYPE_CHECKING:
    import datasets

ROOTS = ("PubmedArticleSet", "article", "pmc-articleset")
BLOCKS = {"title", "p", "label", "list-item", "break", "disp-formula"}  # end a word, while <i> or <sup> do not

_YEAR = re.compile(r"\b(?:1[5-9]|20)\d\d\b")
_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)/(\d\.\d)")
_MEDLINE = re.compile(rb"(?:\xef\xbb\xbf)?\s*PMID- ")
_HREF = "{http://www.w3.org/1999/xlink}href"
_NOT_AVAILABLE = ("", "[Not Available].")  # titles that only their original says


def read_pubmed(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the articles, or the figures, of a file: PubMed XML, MEDLINE text or PMC articles, each also as .gz.

    An article is `pmid`, `title`, `abstract`, `mesh`, `year`, `licence` and `retracted`. The title is the English one,
    or else the original; sections of the abstract have their labels ("METHODS: ..."), and abstracts in other languages
    are left out; `mesh` has the descriptors without qualifiers; `year` is the first one said of the issue, or None;
    `licence` is the copyright notice of the abstract, or None. Books and their chapters are articles without `mesh`. A
    citation that the file deletes is its `pmid` alone.

    A figure is `pmcid`, `pmid`, `label`, `caption`, `graphic` (a file name as the article gives it, often without
    suffix) and `licence`: "CC BY 4.0" or the like, or else the wording, of the figure where it has its own. There is a
    row for each graphic that has a caption.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is cut short, damaged, or of another kind.

    Source: https://www.nlm.nih.gov/bsd/licensee/elements_descriptions.html, and JATS for PMC.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: check the path")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from _read_medline(file) if _MEDLINE.match(file.peek(64)) else read_xml(file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}): download it again") from error
    except ElementTree.ParseError as error:
        raise ValueError(
            f"{path} is neither MEDLINE text nor whole XML ({error}): is it of PubMed or PMC, and all of it?"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason}): save it from PubMed again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_xml(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the rows of [`read_pubmed`] from XML, holding one article at a time.

    Raises:
        ElementTree.ParseError: if it is no whole XML.
        ValueError: if it is XML of another kind, or a record lacks a part.
    """
    events = ElementTree.iterparse(file, ("start", "end"))
    try:
        _, root = next(events)
    except LookupError as error:  # of an encoding
        raise ValueError(f"{error}: save it in UTF-8") from error
    if root.tag not in ROOTS:
        raise ValueError(
            f"<{root.tag}> holds no articles: give a <PubmedArticleSet> (efetch of db=pubmed with retmode=xml), or an"
            " <article> of PMC"
        )
    for event, element in events:
        if event == "end" and element.tag in _READERS:
            try:
                yield from _READERS[element.tag](element)
            except AttributeError as error:  # of None, in the place of an element
                raise ValueError(f"an <{element.tag}> lacks what all of PubMed, or of PMC, have") from error
            root.clear()


def convert_pubmed(paths: Sequence[str | Path], output: str | Path) -> int:
    """Write the rows of files, see [`read_pubmed`], as JSON lines, and return their number.

    What comes again replaces what came before, and citations that a file deletes go, so that PubMed's baseline and its
    daily updates are given in the order of their numbers. Only PMIDs are held in memory.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is damaged or of another kind, articles and figures are mixed, there are neither, or
            `output` does not end in .jsonl.
        OSError: if `output` cannot be written.
    """
    output = json_lines(output)
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}: check the path")
    last: dict[Any, int] = {}  # the line on which each article or figure stands last
    columns, count = None, 0
    with whole_file(output) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            for source, row in tqdm(((path, row) for path in paths for row in read_pubmed(path)), unit=" rows"):
                if row.keys() == {"pmid"}:
                    last.pop(row["pmid"], None)
                    continue
                columns = columns or row.keys()
                if row.keys() != columns:
                    raise ValueError(
                        f"{source} holds other things than {paths[0]}: convert articles and figures apart"
                    )
                last[row["pmid"] if "abstract" in row else (row["pmcid"], row["graphic"])] = count
                count += 1
                file.write(to_line(row))
        if not last:
            raise ValueError(f"no article, and no figure with a caption, in {', '.join(map(str, paths))}")
        if len(last) < count:
            _keep_lines(temporary, set(last.values()))
    return len(last)


def load_pubmed(path: str | Path, cache_dir: str | Path | None = None) -> datasets.Dataset:
    """Return the JSON lines of [`convert_pubmed`] or `fetch_pubmed` as a set with typed columns.

    Args:
        path (`str` or `Path`): the JSON lines.
        cache_dir (`str` or `Path`, *optional*): where `datasets` keeps its form of them.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    import datasets

    with Path(path).open(encoding="utf-8") as file:
        columns = json.loads(file.readline())
    string, year, flag = (datasets.Value(kind) for kind in ("string", "int32", "bool"))
    types = {"mesh": [string], "year": year, "retracted": flag}
    features = datasets.Features({name: types.get(name, string) for name in columns})
    return datasets.Dataset.from_json(str(path), features=features, cache_dir=cache_dir and str(cache_dir))


def json_lines(output: str | Path) -> Path:
    """Return the path of an output, which must end in .jsonl, as those that read it expect.

    Raises:
        ValueError: if it does not.
    """
    if Path(output).suffix != ".jsonl":
        raise ValueError(f"the output {output} must end in .jsonl")
    return Path(output)


def to_line(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON, with its end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def _keep_lines(path: Path, numbers: set[int]) -> None:
    with whole_file(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
        new.writelines(line for number, line in enumerate(old) if number in numbers)


def _read_medline(file: BinaryIO) -> Iterator[dict[str, Any]]:
    try:
        from Bio import Medline
    except ImportError as error:
        raise ValueError('MEDLINE text needs Biopython: pip install "visbio_diffusers[pubmed]"') from error
    number = 0
    try:
        for number, record in enumerate(Medline.parse(io.TextIOWrapper(file, encoding="utf-8-sig")), 1):
            if "PMID" not in record:
                raise ValueError(f"record {number} has no PMID but {' '.join(record)}: save it from PubMed again")
            title = _plain(record.get("TI", ""))
            if title in _NOT_AVAILABLE:
                title = _plain(record.get("TT") or " ".join(record.get("BTI", ())))
            yield {
                "pmid": record["PMID"],
                "title": title,
                "abstract": _plain(record.get("AB", "")),
                "mesh": [term.lstrip("*").split("/")[0] for term in record.get("MH", ())],
                "year": _year(record.get("DP", "")),
                "licence": _plain(" ".join(record.get("CI", ()))) or None,
                "retracted": "Retracted Publication" in record.get("PT", ()),
            }
    except KeyError as error:
        raise ValueError(f"a line after record {number} continues no field: save it from PubMed again") from error


def _read_article(element: ElementTree.Element) -> Iterator[dict[str, Any]]:
    citation = element.find("MedlineCitation")
    article = citation.find("Article")
    title = _text(article.find("ArticleTitle"))
    kinds = [each.text for each in article.iterfind("PublicationTypeList/PublicationType")]
    yield {
        "pmid": citation.findtext("PMID"),
        "title": _text(article.find("VernacularTitle")) if title in _NOT_AVAILABLE else title,
        "abstract": _abstract(article),
        "mesh": [each.text for each in citation.iterfind("MeshHeadingList/MeshHeading/DescriptorName")],
        "year": _year(" ".join(article.find("Journal/JournalIssue/PubDate").itertext())),
        "licence": _text(article.find("Abstract/CopyrightInformation")) or None,
        "retracted": "Retracted Publication" in kinds,
    }


def _read_book(element: ElementTree.Element) -> Iterator[dict[str, Any]]:
    document = element.find("BookDocument")
    yield {
        "pmid": document.findtext("PMID"),
        "title": _text(document.find("ArticleTitle")) or _text(document.find("Book/BookTitle")),
        "abstract": _abstract(document),
        "mesh": [],
        "year": _year(" ".join(document.find("Book/PubDate").itertext())),
        "licence": _text(document.find("Abstract/CopyrightInformation")) or None,
        "retracted": False,
    }


def _read_deleted(element: ElementTree.Element) -> Iterator[dict[str, Any]]:
    for pmid in element.iterfind("PMID"):
        yield {"pmid": pmid.text}


def _abstract(article: ElementTree.Element) -> str:
    """Return the sections of an abstract, each with its label if it has one."""
    sections = []
    for section in article.iterfind("Abstract/AbstractText"):
        label, text = section.get("Label", "UNLABELLED"), _text(section)
        if text:
            sections.append(text if label == "UNLABELLED" else f"{label.rstrip(':')}: {text}")
    return " ".join(sections)


def _read_figures(article: ElementTree.Element) -> Iterator[dict[str, Any]]:
    meta = article.find("front/article-meta")
    ids = {each.get("pub-id-type"): each.text for each in meta.iterfind("article-id")}
    pmcid = ids.get("pmcid") or ids.get("pmc")  # of files since 2025, and before
    for figure in article.iter("fig"):
        caption = _text(figure.find("caption"))
        # The renditions of one graphic are its alternatives.
        graphics = [*figure.iterfind("graphic"), *figure.iterfind("alternatives/graphic[1]")]
        for graphic in graphics if caption else ():
            yield {
                "pmcid": pmcid and f"PMC{pmcid.removeprefix('PMC')}",
                "pmid": ids.get("pmid"),
                "label": _text(figure.find("label")),
                "caption": caption,
                "graphic": graphic.get(_HREF),
                "licence": _licence(figure) or _licence(meta),
            }


_READERS = {
    "PubmedArticle": _read_article,
    "PubmedBookArticle": _read_book,
    "DeleteCitation": _read_deleted,
    "article": _read_figures,
}


def _licence(holder: ElementTree.Element) -> str | None:
    """Return the licence that an element grants: the name of a Creative Commons one, else its wording."""
    said = [each for name in ("permissions", "license", "copyright-statement") for each in holder.iterfind(name)]
    named = _CREATIVE_COMMONS.search("".join(ElementTree.tostring(each, "unicode") for each in said))
    if named:
        kind, version = named.groups()
        return {"zero": "CC0 1.0", "mark": "public domain"}.get(kind, f"CC {kind.upper()} {version}")
    wording = [*(each for part in said for each in part.iter("license")), *said]
    return _text(wording[0]) or None if wording else None


def _text(element: ElementTree.Element | None) -> str:
    """Return the text of an element in one line, that within its markup included; "" of none."""
    if element is None:
        return ""
    for each in element.iter():
        if each.tag == "tex-math":  # beside its MathML
            each.text = None
        if each.tag in BLOCKS:
            each.tail = f" {each.tail or ''}"
    return _plain("".join(element.itertext()))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _year(date: str) -> int | None:
    """Return the first year in "2000 Spring", "1998 Dec-1999 Jan" and the like."""
    found = _YEAR.search(date)
    return int(found[0]) if found else None
