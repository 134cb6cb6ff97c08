"""Fetching from PubMed: against a server on the loopback that is slow, busy, wrong, or cuts connections."""

from __future__ import annotations

import json
import multiprocessing
import threading

import pytest
from entrez_server import EntrezServer, stored_articles

from visbio_diffusers.cli import main
from visbio_diffusers.data import entrez
from visbio_diffusers.data.entrez import fetch_pubmed
from visbio_diffusers.data.pubmed import read_pubmed


@pytest.fixture
def server(visbio_data, monkeypatch):
    """Serve the eight real articles, two in a batch, to a fetcher that does not wait."""
    for name in ("SECONDS", "SECONDS_WITH_KEY", "BACKOFF_SECONDS"):
        monkeypatch.setattr(entrez, name, 0.0)
    monkeypatch.setattr(entrez, "BATCH_SIZE", 2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("NCBI_API_KEY", raising=False)
    with EntrezServer(stored_articles(visbio_data / "pubmed" / "Entrez")) as server:
        yield server


@pytest.fixture
def fetch(server, tmp_path):
    """Return a function that fetches from the server into `out/a.jsonl`, and returns the rows."""

    def run(query: str = "cells", email: str = "me@example.org", **more) -> list[dict]:
        output = tmp_path / "out" / "a.jsonl"
        count = fetch_pubmed(query, output, email, base_url=server.url, **more)
        rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
        assert len(rows) == count
        return rows

    return run


@pytest.fixture
def expected(visbio_data) -> list[dict]:
    """Return the real articles as read from their files, the newest first."""
    paths = (visbio_data / "pubmed" / "Entrez").glob("*.xml")
    return sorted((row for path in paths for row in read_pubmed(path)), key=lambda row: -int(row["pmid"]))


def test_all_articles_come_once_and_the_query_is_kept_beside_them(fetch, server, expected, tmp_path):
    assert len(expected) == 8
    assert fetch() == expected
    assert server.fetched() == [row["pmid"] for row in expected]
    assert all(given["email"] == "me@example.org" and given["tool"] for _, _, given in server.requests)
    note = json.loads((tmp_path / "out" / "a.json").read_text())
    assert (note["query"], note["pmids"], note["unanswered"]) == ("cells", server.fetched(), [])
    requests = len(server.requests)
    assert fetch() == expected
    assert len(server.requests) == requests  # all was there
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.json", "a.jsonl", "a.jsonl.lock"}


def test_no_more_than_wanted_are_fetched(fetch, server, expected):
    assert fetch(max_results=3) == expected[:3]
    assert len(server.fetched()) == 3


@pytest.mark.parametrize("max_results", [None, 5])
def test_searches_longer_than_pubmed_lists_are_taken_by_halves(fetch, server, expected, max_results):
    server.listed = 2
    assert fetch(max_results=max_results) == expected[:max_results]
    assert server.fetched() == [row["pmid"] for row in expected[:max_results]]


def test_an_article_that_is_not_there_is_asked_for_twice_and_noted(fetch, server, expected, tmp_path):
    server.faults = [lambda handler: False, lambda handler: server.articles.pop("28775130") is None]  # once found
    assert fetch() == [row for row in expected if row["pmid"] != "28775130"]
    assert server.fetched().count("28775130") == 2
    assert json.loads((tmp_path / "out" / "a.json").read_text())["unanswered"] == ["28775130"]


FAULTS = {
    "busy": lambda handler: handler.answer("{}", 429) or True,
    "unavailable": lambda handler: handler.answer("", 503) or True,
    "broken": lambda handler: handler.answer("<html>", 500) or True,
    "gateway": lambda handler: handler.answer("<html>", 502) or True,
    "cut": lambda handler: handler.cut() or True,
    "cut chunks": lambda handler: handler.cut(chunked=True) or True,
    "hang up": lambda handler: setattr(handler, "close_connection", True) or True,
    "cut short": lambda handler: handler.answer("<PubmedArticleSet><PubmedArticle><MedlineCitation>") or True,
    "error in 200": lambda handler: handler.answer("<eFetchResult><ERROR>try later</ERROR></eFetchResult>") or True,
    "JSON in 200": lambda handler: handler.answer('{"error":"API rate limit exceeded","count":"11"}') or True,
    "search failed": lambda handler: handler.answer("<eSearchResult><ERROR>Backend</ERROR></eSearchResult>") or True,
    "page in 200": lambda handler: handler.answer("<!DOCTYPE html><html><body>Blocked</body></html>") or True,
}


def test_faults_are_survived_in_any_request(fetch, server, expected, monkeypatch):
    monkeypatch.setattr(entrez, "BATCH_SIZE", 1)
    faults = [*FAULTS.values()]
    for first, second in zip(faults[::2], faults[1::2]):
        server.faults += [first, second, lambda handler: False]
    assert fetch() == expected
    assert not server.faults
    assert len(server.requests) == 1 + len(expected) + len(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_lasts_is_told_in_one_line_and_what_came_stays(name, fetch, server, expected):
    server.faults = [lambda handler: False] * 3 + [FAULTS[name]] * entrez.ATTEMPTS
    with pytest.raises(OSError, match="give the same command again") as error:
        fetch()
    assert "\n" not in str(error.value) and server.url in str(error.value)
    assert len(server.fetched()) == 4 + 2 * entrez.ATTEMPTS
    server.requests.clear()
    assert fetch() == expected
    assert server.fetched() == [row["pmid"] for row in expected[4:]]


def test_errors_are_told_in_the_words_of_the_server(fetch, server):
    server.faults = [FAULTS["error in 200"]] * entrez.ATTEMPTS
    with pytest.raises(OSError, match=r"efetch|esearch.*try later"):
        fetch()
    server.faults = [lambda handler: handler.answer('{"error":"API key invalid","api-key":"s3cret"}', 400) or True]
    with pytest.raises(OSError, match="refuses: API key invalid$"):
        fetch(api_key="s3cret")
    assert len(server.faults) == 0 and server.requests[-1][2]["api_key"] == "s3cret"


def test_retry_after_is_waited_for(fetch, server, expected):
    server.faults = [lambda handler: False, lambda handler: handler.answer("", 429, Retry_After="1") or True]
    assert fetch() == expected
    times = [when for when, _, _ in server.requests]
    assert times[2] - times[1] > 0.95 and times[1] - times[0] < 0.9


@pytest.mark.parametrize("key, allowed", [(None, 3), ("key", 10)])
def test_the_rate_is_kept_in_every_second_faults_included(key, allowed, fetch, server, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(entrez, "BATCH_SIZE", 2 if allowed == 3 else 1)
    monkeypatch.setattr(entrez, "BACKOFF_SECONDS", 0.0)
    server.faults = [FAULTS["busy"], FAULTS["cut"], FAULTS["busy"], FAULTS["hang up"]] if allowed == 10 else []
    fetch(api_key=key)
    times = [when for when, _, _ in server.requests]
    assert len(times) > allowed
    assert all(later - first > 1 for first, later in zip(times, times[allowed:]))


def test_a_killed_command_goes_on_where_it_stopped(fetch, server, expected, tmp_path):
    waiting, over = threading.Event(), threading.Event()

    def hang(handler) -> bool:
        waiting.set()
        over.wait(60)
        handler.close_connection = True
        return True

    server.faults = [lambda handler: False] * 2 + [hang]
    output = str(tmp_path / "out" / "a.jsonl")
    command = [
        "data",
        "pubmed",
        "--query",
        "cells",
        "--email",
        "a@b.org",
        "--output",
        output,
        "--base_url",
        server.url,
    ]
    process = multiprocessing.get_context("fork").Process(target=main, args=(command,))  # imports nothing anew
    process.start()
    try:
        assert waiting.wait(60)
    finally:
        process.kill()
        process.join()
        over.set()
    assert not (tmp_path / "out" / "a.jsonl").exists()
    asked = len(server.requests)
    assert main(command) == 0
    assert server.requests[asked][1] == "efetch"  # nothing is searched again
    rows = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text("utf-8").splitlines()]
    assert rows == expected
    again = [pmid for _, _, given in server.requests[asked:] for pmid in given["id"].split(",")]
    assert again == [row["pmid"] for row in expected[2:]]


def test_a_fetch_goes_on_from_whatever_a_kill_has_left(fetch, server, expected, tmp_path):
    rows = fetch()
    output, note, part = (tmp_path / "out" / name for name in ("a.jsonl", "a.json", "a.jsonl.part"))
    whole, record = output.read_bytes(), note.read_text()
    without = json.dumps({name: value for name, value in json.loads(record).items() if name != "unanswered"})
    for cut in [0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)]:
        for text in (without, record):
            output.unlink()
            note.write_text(text)
            part.write_bytes(whole[:cut])
            server.requests.clear()
            assert fetch() == rows
            assert len(server.fetched()) == len(rows) - whole[:cut].count(b"\n")


def test_two_runs_at_once_fetch_once(fetch, server, expected):
    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.fetched() == [row["pmid"] for row in expected]
    assert fetch() == expected


MISTAKES = {
    "empty query": ({"query": "  "}, "the query is empty"),
    "no results": ({"query": "yeti"}, "PubMed finds nothing for 'yeti'"),
    "e-mail": ({"email": "me at example.org"}, "'me at example.org' is no e-mail address"),
    "number": ({"max_results": 0}, "max_results=0: keep at least 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_leave_nothing(case, fetch, tmp_path):
    arguments, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        fetch(**arguments)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_output_of_another_query_or_kind_is_refused(fetch, tmp_path):
    with pytest.raises(ValueError, match=r"the output a\.json must end in \.jsonl"):
        fetch_pubmed("cells", "a.json", "me@example.org")
    fetch(max_results=2)
    with pytest.raises(ValueError, match=r"a\.json says max_results=2, not None"):
        fetch()
    with pytest.raises(ValueError, match=r"a\.json says query='cells', not 'blood'"):
        fetch("blood")
    (tmp_path / "out" / "a.json").unlink()
    with pytest.raises(ValueError, match=r"a\.jsonl exists and is not of this query"):
        fetch()


USAGE = {
    "neither": (["--output", "a.jsonl"], "give either files or --query"),
    "both": (["a.xml", "--query", "cells", "--output", "a.jsonl"], "give either files or --query"),
    "no e-mail": (["--query", "cells", "--output", "a.jsonl"], "--query needs --email"),
    "no output": (["a.xml"], "required: --output"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_answered_in_one_line(case, capsys):
    arguments, message = USAGE[case]
    with pytest.raises(SystemExit) as error:
        main(["data", "pubmed", *arguments])
    shown = capsys.readouterr().err
    assert error.value.code == 2 and message in shown and shown.count("\n") == 1


def test_key_is_taken_from_the_environment(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NCBI_API_KEY", "s3cret")
    arguments = ["--query", "cells", "--email", "a@b.org", "--max_results", "1", "--output", str(tmp_path / "a.jsonl")]
    assert main(["data", "pubmed", *arguments, "--base_url", server.url]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.jsonl'}: 1 rows\n"
    assert {given["api_key"] for _, _, given in server.requests} == {"s3cret"}
    assert not any(b"s3cret" in path.read_bytes() for path in tmp_path.iterdir())
