"""Files of PubMed and PMC: the real ones beside their raw text, decisions about records, damaged and hostile files."""

from __future__ import annotations

import gzip
import html
import json
import re
import tracemalloc
from pathlib import Path

import pytest
from Bio import Entrez
from entrez_server import EntrezServer
from PIL import Image

from visbio_diffusers.cli import main
from visbio_diffusers.data.corpus import read_corpus
from visbio_diffusers.data.pubmed import convert_pubmed, load_pubmed, read_pubmed


ARTICLE = {"pmid", "title", "abstract", "mesh", "year", "licence", "retracted"}


@pytest.fixture
def folder(visbio_data) -> Path:
    return visbio_data / "pubmed"


def plain(markup: str) -> str:
    """Return the letters of XML without its tags and spaces."""
    return "".join(html.unescape(re.sub(r"<[^>]*>", "", markup)).split())


def test_every_real_file_is_read(folder):
    found = {path.name: list(read_pubmed(path)) for path in folder.rglob("*.*") if path.suffix in (".xml", ".nxml")}
    found |= {path.name: list(read_pubmed(path)) for path in (folder / "Medline").iterdir()}
    assert {name: len(rows) for name, rows in found.items()} == {
        "pubmed1.xml": 2, "pubmed2.xml": 2, "pubmed4.xml": 1, "pubmed5.xml": 1, "pubmed6.xml": 1, "pubmed7.xml": 1,
        "pubmed-29768149.xml": 1, "pubmed_result1.txt": 1, "pubmed_result2.txt": 4, "pubmed_result3.txt": 1,
        "1471-2180-11-174.nxml": 4, "1472-6831-8-11.nxml": 0, "6605965a.nxml": 0, "ehp-116-1694.nxml": 3,
        "mds526.nxml": 2, "pntd.0002065.nxml": 1, "pone.0000217.nxml": 3, "pone.0046493.nxml": 4,
    }  # fmt: skip
    assert all(row.keys() == ARTICLE for name, rows in found.items() if "pubmed" in name for row in rows)


def test_articles_say_what_their_xml_says(folder):
    """By regular expressions over the raw text."""
    for path in [*(folder / "Entrez").glob("*.xml"), folder / "pmc" / "pubmed-29768149.xml"]:
        raws = re.findall(r"<PubmedArticle>.*?</PubmedArticle>", path.read_text("utf-8"), re.DOTALL)
        for raw, row in zip(raws, read_pubmed(path), strict=True):
            assert row["pmid"] == re.search(r"<PMID[^>]*>(\d+)</PMID>", raw)[1]
            assert plain(row["title"]) == plain(re.search(r"<ArticleTitle>(.*?)</ArticleTitle>", raw, re.DOTALL)[1])
            sections = re.findall(r"<AbstractText([^>]*)>(.*?)</AbstractText>", raw, re.DOTALL)
            labels = [re.search(r'\bLabel="([^"]*)"', attributes) for attributes, _ in sections]
            parts = [(f"{label[1]}:" if label else "") + plain(text) for label, (_, text) in zip(labels, sections)]
            assert plain(html.escape(row["abstract"])) == plain("".join(map(html.escape, parts)))
            assert row["mesh"] == [html.unescape(term) for term in re.findall(r"<DescriptorName[^>]*>(.*?)<", raw)]
            assert row["year"] == int(re.search(r"<PubDate>\s*<Year>(\d{4})</Year>", raw)[1])
            notice = re.search(r"<CopyrightInformation>(.*?)</CopyrightInformation>", raw, re.DOTALL)
            assert row["licence"] == (html.unescape(notice[1]) if notice else None)


def test_article_is_that_of_biopython(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # where it keeps DTDs
    path = folder / "Entrez" / "pubmed4.xml"
    with path.open("rb") as file:
        (record,) = Entrez.read(file, escape=True)["PubmedArticle"]
    (row,) = read_pubmed(path)
    citation = record["MedlineCitation"]
    article = citation["Article"]
    assert (row["pmid"], plain(row["title"])) == (citation["PMID"], plain(article["ArticleTitle"]))
    sections = [f"{section.attributes['Label']}: {section}" for section in article["Abstract"]["AbstractText"]]
    assert plain(html.escape(row["abstract"])) == plain("".join(sections))
    assert row["mesh"] == [heading["DescriptorName"] for heading in citation["MeshHeadingList"]]
    assert str(row["year"]) == article["Journal"]["JournalIssue"]["PubDate"]["Year"]


def test_medline_text_says_what_its_lines_say(folder):
    """By regular expressions over the raw text."""
    for path in (folder / "Medline").iterdir():
        raws = path.read_text("utf-8").strip().split("\n\n")
        for raw, row in zip(raws, read_pubmed(path), strict=True):
            fields = re.findall(r"^(\w+) *- (.*(?:\n {6}.*)*)", raw, re.MULTILINE)
            said = {name: [text for field, text in fields if field == name] for name, _ in fields}
            assert row["pmid"] == said["PMID"][0]
            assert row["title"].split() == said["TI"][0].split()
            assert row["abstract"].split() == said["AB"][0].split()
            assert row["mesh"] == [re.sub(r"/.*|^\*", "", " ".join(term.split())) for term in said.get("MH", [])]
            assert row["year"] == int(said["DP"][0][:4])
            assert (row["licence"], row["retracted"]) == (None, False)


def test_figures_say_what_their_articles_say(folder):
    """By regular expressions over the raw text."""
    for path in (folder / "pmc").glob("*.nxml"):
        raw = path.read_text("utf-8")
        figures = re.findall(r"<fig .*?</fig>", raw, re.DOTALL)
        for figure, row in zip(figures, read_pubmed(path), strict=True):
            assert row["pmcid"] == "PMC" + re.search(r'<article-id pub-id-type="pmc">(\d+)<', raw)[1]
            assert row["pmid"] == re.search(r'<article-id pub-id-type="pmid">(\d+)<', raw)[1]
            assert row["label"] == re.search(r"<label>(.*?)</label>", figure)[1]
            assert plain(html.escape(row["caption"])) == plain(
                re.search(r"<caption>.*</caption>", figure, re.DOTALL)[0]
            )
            assert row["graphic"] == re.search(r'<graphic [^>]*xlink:href="(.*?)"', figure)[1]
    licences = {path.stem: {row["licence"] for row in read_pubmed(path)} for path in (folder / "pmc").glob("*.nxml")}
    assert licences["1471-2180-11-174"] == {"CC BY 2.0"}
    assert licences["mds526"] == {"CC BY-NC 3.0"}
    assert licences["ehp-116-1694"] == {"public domain"}
    for name in ("pntd.0002065", "pone.0046493", "pone.0000217"):
        (wording,) = licences[name]
        assert "distributed under the terms of the Creative Commons Attribution License, which permits" in wording


RECORDS = """<?xml version="1.0"?>
<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2025//EN" "{url}/pubmed_250101.dtd">
<PubmedArticleSet>
<PubmedArticle><MedlineCitation><PMID Version="1">1</PMID><Article><Journal><JournalIssue><PubDate>
<MedlineDate>1998 Dec-1999 Jan</MedlineDate></PubDate></JournalIssue></Journal>
<ArticleTitle>Role of <i>p53<sup>-/-</sup></i> cells &amp; CO<sub>2</sub>.</ArticleTitle>
<Abstract><AbstractText Label="AIM:" NlmCategory="OBJECTIVE">To see <b>H<sub>2</sub>O</b> at
 &lt; 5 &#xb5;m.</AbstractText><AbstractText Label="UNLABELLED">More.</AbstractText><AbstractText Label="NOTE"/>
<AbstractText>Formula <mml:math xmlns:mml="http://www.w3.org/1998/Math/MathML"><mml:mi>x</mml:mi></mml:math>.
</AbstractText><CopyrightInformation>Copyright 1999 A.</CopyrightInformation></Abstract>
<PublicationTypeList><PublicationType UI="D016441">Retracted Publication</PublicationType></PublicationTypeList>
</Article><MeshHeadingList><MeshHeading><DescriptorName>Mice</DescriptorName><QualifierName>blood</QualifierName>
</MeshHeading></MeshHeadingList><OtherAbstract Language="fre"><AbstractText>Le but.</AbstractText></OtherAbstract>
<CommentsCorrectionsList><CommentsCorrections><PMID>99</PMID></CommentsCorrections></CommentsCorrectionsList>
</MedlineCitation></PubmedArticle>
<PubmedArticle><MedlineCitation><PMID>2</PMID><Article><Journal><JournalIssue><PubDate><MedlineDate>Spring 2000
</MedlineDate></PubDate></JournalIssue></Journal><ArticleTitle>[Not Available].</ArticleTitle>
<VernacularTitle>Les cellules.</VernacularTitle></Article><OtherAbstract Language="fre"><AbstractText>Le but.
</AbstractText></OtherAbstract></MedlineCitation></PubmedArticle>
<PubmedBookArticle><BookDocument><PMID>3</PMID><Book><BookTitle>The book</BookTitle><PubDate><Year>2011</Year>
<Month>05</Month></PubDate></Book><ArticleTitle>A chapter</ArticleTitle><Abstract><AbstractText>Of it.</AbstractText>
<CopyrightInformation>Copyright B</CopyrightInformation></Abstract></BookDocument></PubmedBookArticle>
<PubmedBookArticle><BookDocument><PMID>4</PMID><Book><BookTitle>The book</BookTitle><PubDate/></Book></BookDocument>
</PubmedBookArticle>
<DeleteCitation><PMID>7</PMID><PMID>8</PMID></DeleteCitation>
</PubmedArticleSet>"""

MEDLINE = """
PMID- 1
TI  - [Not Available].
TT  - Les cellules
      du sang.
DP  - 1998 Dec-1999 Jan
AB  - AIM: To see.
OAB - Le but.
OABL- fre
CI  - Copyright 1999
      A.
PT  - Journal Article
PT  - Retracted Publication
MH  - *Mice/*blood/genetics

PMID- 2
BTI - The book
DP  - 2011
"""


def test_decisions_about_records(tmp_path):
    (tmp_path / "a.xml").write_text(RECORDS)
    first, second, chapter, book, *deleted = read_pubmed(tmp_path / "a.xml")
    assert first == {
        "pmid": "1",
        "title": "Role of p53-/- cells & CO2.",
        "abstract": "AIM: To see H2O at < 5 \u00b5m. More. Formula x.",
        "mesh": ["Mice"],
        "year": 1998,
        "licence": "Copyright 1999 A.",
        "retracted": True,
    }
    assert (second["title"], second["abstract"], second["year"]) == ("Les cellules.", "", 2000)
    assert (chapter["title"], chapter["abstract"], chapter["year"]) == ("A chapter", "Of it.", 2011)
    assert (chapter["mesh"], chapter["licence"]) == ([], "Copyright B")
    assert (book["title"], book["year"], book.keys()) == ("The book", None, ARTICLE)
    assert deleted == [{"pmid": "7"}, {"pmid": "8"}]

    (tmp_path / "a.nbib").write_text(MEDLINE, encoding="utf-8-sig")
    first, book = read_pubmed(tmp_path / "a.nbib")
    assert first == {
        "pmid": "1",
        "title": "Les cellules du sang.",
        "abstract": "AIM: To see.",
        "mesh": ["Mice"],
        "year": 1998,
        "licence": "Copyright 1999 A.",
        "retracted": True,
    }
    assert (book["title"], book["abstract"], book["year"], book["retracted"]) == ("The book", "", 2011, False)


FIGURES = """<article xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:ali="http://www.niso.org/schemas/ali/1.0/">
<front><article-meta><article-id pub-id-type="pmcid">PMC12</article-id><article-id pub-id-type="pmid">34</article-id>
<permissions><license><ali:license_ref>https://creativecommons.org/licenses/by-nc-nd/4.0/</ali:license_ref>
<license-p>Open access.</license-p></license></permissions></article-meta></front><body>
<fig><label>Fig. 1</label><caption><title>Cells</title><p>One <italic>x<sup>2</sup></italic></p><p>Two
<inline-formula><alternatives><tex-math>\\documentclass{minimal}</tex-math><mml:math
xmlns:mml="http://www.w3.org/1998/Math/MathML"><mml:mi>y</mml:mi></mml:math></alternatives></inline-formula></p></caption>
<graphic id="g" xlink:href="a.jpg"/><graphic xlink:href="b.jpg"/></fig>
<fig><caption><p>Three</p></caption><alternatives><graphic xlink:href="c.tif"/><graphic xlink:href="c.jpg"/>
</alternatives><permissions><copyright-statement>Reprinted from D</copyright-statement></permissions></fig>
<fig><caption><p>A film</p></caption><media xlink:href="d.mp4"/></fig><fig><graphic xlink:href="e.jpg"/></fig>
</body></article>"""


def test_decisions_about_figures(tmp_path):
    for text in (FIGURES, f"<pmc-articleset>{FIGURES}</pmc-articleset>"):
        (tmp_path / "a.nxml").write_text(text)
        first, second, third = read_pubmed(tmp_path / "a.nxml")
        assert first == {
            "pmcid": "PMC12",
            "pmid": "34",
            "label": "Fig. 1",
            "caption": "Cells One x2 Two y",
            "graphic": "a.jpg",
            "licence": "CC BY-NC-ND 4.0",
        }
        assert second == {**first, "graphic": "b.jpg"}
        assert third == {**first, "label": "", "caption": "Three", "graphic": "c.tif", "licence": "Reprinted from D"}


def test_json_lines_feed_the_text_encoder_the_search_and_datasets(folder, tmp_path, tiny_dual_encoder_dir, capsys):
    output = tmp_path / "new" / "out.jsonl"
    paths = sorted((folder / "Entrez").glob("*.xml"))
    assert main(["data", "pubmed", *map(str, paths), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: 8 rows\n"
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
    rows = [row for path in paths for row in read_pubmed(path)]
    assert read_corpus(str(output)) == [row["abstract"] for row in rows if row["abstract"]]
    table = load_pubmed(output, tmp_path / "cache")
    assert table.to_list() == rows

    Image.new("RGB", (8, 8)).save(tmp_path / "cell.png")
    search = ["--image", str(tmp_path / "cell.png"), "--corpus", str(output), "--top", "3", "--device", "cpu"]
    assert main(["search", *search, "--model", str(tiny_dual_encoder_dir)]) == 0
    found = capsys.readouterr().out
    assert sum(row["pmid"] in found for row in rows) == 3

    assert convert_pubmed([*(folder / "pmc").glob("*.nxml")], tmp_path / "figures.jsonl") == 17
    table = load_pubmed(tmp_path / "figures.jsonl", tmp_path / "cache")
    assert (len(table), table.column_names[:3]) == (17, ["pmcid", "pmid", "label"])


def test_later_records_replace_earlier_ones_and_deleted_ones_go(tmp_path):
    def record(pmid: int, text: str) -> str:
        return f"PMID- {pmid}\nDP  - 2000\nAB  - {text}\n\n"

    (tmp_path / "1.nbib").write_text(
        record(1, "one") + record(7, "seven") + record(6, "six") + record(6, "six, again")
    )
    (tmp_path / "2.xml").write_text(RECORDS)
    (tmp_path / "3.nbib").write_text(record(8, "eight, anew"))
    paths = [tmp_path / name for name in ("1.nbib", "2.xml", "3.nbib")]
    assert convert_pubmed(paths, tmp_path / "out.jsonl") == 6
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [row["pmid"] for row in rows] == ["6", "1", "2", "3", "4", "8"]
    assert (rows[0]["abstract"], rows[1]["title"]) == ("six, again", "Role of p53-/- cells & CO2.")


def peak_memory(path: Path) -> tuple[int, int]:
    tracemalloc.start()
    count = sum(1 for _ in read_pubmed(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return count, peak


def test_long_files_take_no_more_memory_than_short_ones(folder, tmp_path):
    raw = (folder / "Entrez" / "pubmed6.xml").read_bytes()
    start, end = raw.index(b"<PubmedArticle>"), raw.index(b"</PubmedArticleSet>")
    peaks = {}
    for count in (10, 100):
        with gzip.open(tmp_path / f"{count}.xml.gz", "wb", compresslevel=1) as file:
            file.write(raw[:start] + raw[start:end] * count + raw[end:])
        read, peaks[count] = peak_memory(tmp_path / f"{count}.xml.gz")
        assert read == count
    assert peaks[100] < 1.3 * peaks[10] < 100 * (end - start)


def bomb(of: str) -> str:
    levels = "".join(f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in zip("abcdefghij", "bcdefghijk"))
    text = RECORDS.split("<PubmedArticleSet>", 1)[1].replace("Les cellules", of)
    return f'<!DOCTYPE PubmedArticleSet [<!ENTITY a "aaaaaaaaaa">{levels}]><PubmedArticleSet>{text}'


def test_entities_neither_grow_nor_open_files_or_addresses(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("s3cret")
    text = RECORDS.split("<PubmedArticleSet>", 1)[1].replace("Les cellules", "&x;")
    with EntrezServer({}) as server:
        (tmp_path / "a.xml").write_text(RECORDS.replace("{url}", server.url))
        assert len(list(read_pubmed(tmp_path / "a.xml"))) == 6  # its DTD is not fetched
        for place in (secret.as_uri(), f"{server.url}/x"):
            kinds = f'<!ENTITY x SYSTEM "{place}">', f'<!ENTITY % p SYSTEM "{place}">%p;'
            for declared in kinds:
                hostile = f"<!DOCTYPE PubmedArticleSet [{declared}]><PubmedArticleSet>{text}"
                (tmp_path / "a.xml").write_text(hostile)
                with pytest.raises(ValueError, match="undefined entity") as error:
                    list(read_pubmed(tmp_path / "a.xml"))
                assert "s3cret" not in str(error.value)
        assert server.requests == []
    (tmp_path / "a.xml").write_text(bomb("&b;"))
    assert "a" * 100 in [row.get("title", "").rstrip(".") for row in read_pubmed(tmp_path / "a.xml")]
    tracemalloc.start()
    (tmp_path / "a.xml").write_text(bomb("&k;"))
    with pytest.raises(ValueError, match="amplification"):
        list(read_pubmed(tmp_path / "a.xml"))
    assert tracemalloc.get_traced_memory()[1] < 2**26  # of the 10^11 letters that it says
    tracemalloc.stop()


WHOLE = gzip.compress(RECORDS.encode())
BAD = {
    "a.xml.gz": (RECORDS.encode(), "is no whole gzip file"),
    "b.xml.gz": (WHOLE[: len(WHOLE) // 2], "is no whole gzip file"),
    "c.xml.gz": (WHOLE[:-8] + b"12345678", "is no whole gzip file"),
    "d.xml.gz": (WHOLE[:100] + b"\xff" * 50 + WHOLE[150:], "is no whole gzip file"),
    "e.xml.gz": (b"", "is neither MEDLINE text nor whole XML"),
    "a.xml": (RECORDS[:-300].encode(), "is neither MEDLINE text nor whole XML (no element found: line"),
    "b.xml": (RECORDS.replace("<i>", "<i>\u00b5").encode("latin-1"), "(not well-formed (invalid token): line 6"),
    "c.xml": (b'<?xml version="1.0" encoding="klingon"?><PubmedArticleSet/>', "unknown encoding: klingon"),
    "d.xml": (b"\x89PNG\r\n\x1a\n" * 9, "is neither MEDLINE text nor whole XML"),
    "e.xml": (b"", "is neither MEDLINE text nor whole XML"),
    "f.xml": (
        b"<eInfoResult><DbList><DbName>pubmed</DbName></DbList></eInfoResult>",
        "<eInfoResult> holds no articles",
    ),
    "g.xml": (b"<eSummaryResult><DocSum/></eSummaryResult>", "<eSummaryResult> holds no articles"),
    "h.xml": (b"<NLMCatalogRecordSet/>", "<NLMCatalogRecordSet> holds no articles"),
    "i.xml": (b"<eSearchResult><Count>1</Count></eSearchResult>", "<eSearchResult> holds no articles"),
    "j.xml": (b"<html><body>Blocked</body></html>", "<html> holds no articles"),
    "k.xml": (b"<PubmedArticleSet></PubmedArticleSet>", "no article, and no figure with a caption, in"),
    "l.xml": (b"<article><title>DocBook</title></article>", "<article> lacks what all of PubMed, or of PMC, have"),
    "m.xml": (b"<PubmedArticleSet><PubmedArticle/></PubmedArticleSet>", "<PubmedArticle> lacks what all of PubMed"),
    "a.txt": (b"1. Cell. 2000. The abstract format.", "is neither MEDLINE text nor whole XML"),
    "b.txt": (MEDLINE.replace("Les", "L\u00e9s").encode("latin-1"), "is not in UTF-8 (invalid continuation byte)"),
    "c.txt": (MEDLINE.encode() + b"\nid: 3 Error occurred\n", "record 3 has no PMID but id:"),
    "d.txt": (MEDLINE.encode() + b"\n      more\n", "a line after record 2 continues no field"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_in_one_line_and_nothing_is_written(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = BAD[name]
    Path(name).write_bytes(content)
    Path("out.jsonl").write_text("before")
    assert main(["data", "pubmed", name, "--output", "out.jsonl"]) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("visbio: error: ") and name in shown and message in shown
    assert {path.name for path in tmp_path.iterdir()} == {name, "out.jsonl"}
    assert Path("out.jsonl").read_text() == "before"


def test_missing_and_mixed_files_are_refused(folder, tmp_path):
    article, figures = folder / "Entrez" / "pubmed1.xml", folder / "pmc" / "mds526.nxml"
    with pytest.raises(FileNotFoundError, match=r"no file gone\.xml: check the path"):
        convert_pubmed([article, "gone.xml"], tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"mds526\.nxml holds other things than .*pubmed1\.xml"):
        convert_pubmed([article, figures], tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"the output .*out\.xml must end in \.jsonl"):
        convert_pubmed([article], tmp_path / "out.xml")
    assert not list(tmp_path.iterdir())


def test_utf_16_and_compressed_medline_are_read(tmp_path):
    (tmp_path / "a.xml").write_text(RECORDS, encoding="utf-16")
    (tmp_path / "a.xml.gz").write_bytes(WHOLE)
    (tmp_path / "a.nbib.gz").write_bytes(gzip.compress(MEDLINE.encode()))
    assert list(read_pubmed(tmp_path / "a.xml")) == list(read_pubmed(tmp_path / "a.xml.gz"))
    assert [row["pmid"] for row in read_pubmed(tmp_path / "a.nbib.gz")] == ["1", "2"]
