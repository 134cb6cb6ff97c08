"""Abstracts of PubMed for a query, from NCBI's E-utilities: resumable, within their rate limit, and atomic.

The PMIDs that a search lists are fetched by number, not from the history of the server, which forgets after hours and
gives no more than 10,000. Bio.Entrez would not do: its settings are global, it repeats a request at once after a 429
whatever Retry-After says, and does not notice bodies that are cut and errors within answers.
"""

from __future__ import annotations

import datetime
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar
from xml.etree import ElementTree

import requests
from filelock import FileLock
from tqdm.auto import tqdm

from visbio_diffusers.data.pubmed import json_lines, read_xml, to_line
from visbio_diffusers.files import whole_file


logger = logging.getLogger(__name__)

T = TypeVar("T")

BASE_URL = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils"
SECONDS, SECONDS_WITH_KEY = 0.37, 0.11  # from request to request; NCBI allows 3 in a second, and 10 with a key
BATCH_SIZE = 200  # articles of one request
SEARCH_SIZE = 10_000  # PMIDs that PubMed lists of one search, at most
HIGHEST_PMID = 99_999_999
TIMEOUT_SECONDS = 60
ATTEMPTS = 6
BACKOFF_SECONDS = 1.0  # before the second of these, doubled each time, unless the server says how long

_ERROR = re.compile(rb'(?:<ERROR>|"error": *")([^<"]+)')


def fetch_pubmed(
    query: str,
    output: str | Path,
    email: str,
    max_results: int | None = None,
    api_key: str | None = None,
    base_url: str = BASE_URL,
) -> int:
    """Write the articles that PubMed finds for a query as JSON lines, see `read_pubmed`, and return their number.

    Beside `output` a file of the same name with the suffix .json keeps the query, its day, the PMIDs found, and
    those of them that PubMed has no article for (`unanswered`). What has come lies in `<output>.part`; a later call
    with the same arguments goes on from there, and does nothing once all has come.

    Args:
        query (`str`): in PubMed's own language, such as "eosinophils[mesh] AND 2020:2024[dp]".
        output (`str` or `Path`): the JSON lines.
        email (`str`): whom NCBI tells if something goes wrong.
        max_results (`int`, *optional*): keep this many, the first of PubMed's list, on which the newest come first.
        api_key (`str`, *optional*): of an NCBI account; with it 10 requests a second are made instead of 3.
        base_url (`str`): where the E-utilities are.

    Raises:
        ValueError: if the query is empty or finds nothing, the e-mail address is none, `max_results` is below 1, or
            `output` is of another query or does not end in .jsonl.
        OSError: if NCBI refuses or cannot be reached, or the output cannot be written.

    Source: https://www.ncbi.nlm.nih.gov/books/NBK25499/ and NBK25497.
    """
    query, output = query.strip(), json_lines(output)
    if not query:
        raise ValueError("the query is empty: say what to look for, as on PubMed's page")
    if not re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s]+", email):
        raise ValueError(f"{email!r} is no e-mail address: NCBI asks for yours")
    if max_results is not None and max_results < 1:
        raise ValueError(f"max_results={max_results}: keep at least 1, or leave it out to keep all")
    output.parent.mkdir(parents=True, exist_ok=True)
    note, part = output.with_suffix(".json"), Path(f"{output}.part")
    server = _Server(base_url, email, api_key)
    with FileLock(f"{output}.lock"):  # two runs must not append to one part
        record = _begun(note, output, {"query": query, "max_results": max_results})
        if "pmids" not in record:
            record |= {"date": datetime.date.today().isoformat(), "pmids": _search(server, query, max_results)}
            _write_note(note, record)
        if not output.exists():
            record["unanswered"] = _fetch(server, record["pmids"], part)
            _write_note(note, record)
            os.replace(part, output)
    return len(record["pmids"]) - len(record["unanswered"])


def _begun(note: Path, output: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier run has noted, else what is asked, and refuse an output that is of something else."""
    record = json.loads(note.read_text(encoding="utf-8")) if note.exists() else asked
    if output.exists() and "unanswered" not in record:
        raise ValueError(f"{output} exists and is not of this query: choose another --output")
    for name, value in asked.items():
        if record.get(name) != value:
            raise ValueError(f"{note} says {name}={record.get(name)!r}, not {value!r}: choose another --output")
    return record


def _write_note(note: Path, record: dict[str, Any]) -> None:
    with whole_file(note) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _search(server: _Server, query: str, max_results: int | None) -> list[str]:
    """Return the PMIDs that a query finds, by halves of the range of PMIDs where one answer does not list them all."""
    count, pmids = server.search(query, min(max_results or SEARCH_SIZE, SEARCH_SIZE))
    if not count:
        raise ValueError(f"PubMed finds nothing for {query!r}: try the query on its page")
    wanted = min(count, max_results or count)
    if len(pmids) >= wanted:
        return pmids[:wanted]
    pmids, ranges = [], [(1, HIGHEST_PMID)]
    with tqdm(total=wanted, desc="searching", unit=" articles") as bar:
        while ranges and len(pmids) < wanted:
            low, high = ranges.pop()
            count, found = server.search(f"({query}) AND {low}:{high}[uid]", SEARCH_SIZE)
            if len(found) < count and low < high:
                middle = (low + high) // 2
                ranges += [(low, middle), (middle + 1, high)]  # the newest are next
            else:
                pmids += found
                bar.update(len(found))
    return pmids[:wanted]


def _fetch(server: _Server, pmids: Sequence[str], part: Path) -> list[str]:
    """Append to `part` the articles that it does not have yet, and return the PMIDs for which there is none."""
    done = _whole_lines(part)
    with part.open("a", encoding="utf-8") as file, tqdm(total=len(pmids), initial=len(done), unit=" articles") as bar:
        for _ in range(2):  # what an answer leaves out is asked for once more
            missing = [pmid for pmid in pmids if pmid not in done]
            for start in range(0, len(missing), BATCH_SIZE):
                batch = missing[start : start + BATCH_SIZE]
                rows = server.fetch(batch)
                _append(file, "".join(to_line(rows[pmid]) for pmid in batch if pmid in rows))
                done.update(rows)
                bar.update(len(rows))
    return [pmid for pmid in pmids if pmid not in done]


def _append(file: TextIO, lines: str) -> None:
    try:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write {file.name}: {error.strerror}; make room, then give the command again") from error


def _whole_lines(part: Path) -> set[str]:
    """Return the PMIDs in `part`, after cutting off a last line that was written by half."""
    part.touch()
    done, end = set(), 0
    with part.open("r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                done.add(json.loads(line)["pmid"])
                end += len(line)
        file.truncate(end)
    return done


class _Server:
    """The E-utilities, asked no more often than they allow, and again after a fault."""

    def __init__(self, base_url: str, email: str, api_key: str | None):
        self.base_url, self.session = base_url.rstrip("/"), requests.Session()
        self.who = {"db": "pubmed", "tool": "visbio_diffusers", "email": email}
        self.who |= {"api_key": api_key} if api_key else {}
        self.interval = SECONDS_WITH_KEY if api_key else SECONDS
        self.next_time = 0.0

    def search(self, query: str, size: int) -> tuple[int, list[str]]:
        """Return how many articles a query finds, and up to `size` PMIDs, the newest."""
        answer = self._ask("esearch", {"term": query, "retmax": size}, _read_search)
        remarks = [each for name in ("ErrorList", "WarningList") for each in answer.iterfind(f"{name}/*")]
        if remarks:
            logger.warning("PubMed says of %s: %s", query, "; ".join(f"{each.tag} {each.text}" for each in remarks))
        return int(answer.findtext("Count")), [each.text for each in answer.iterfind("IdList/Id")]

    def fetch(self, pmids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the articles of PMIDs by their PMID, without those that PubMed has not."""
        return self._ask("efetch", {"id": ",".join(pmids), "retmode": "xml"}, _read_articles)

    def _ask(self, program: str, parameters: dict[str, Any], read: Callable[[bytes], T]) -> T:
        """Return what `read` makes of an answer. All is posted: no list is too long, and no address holds the key."""
        url = f"{self.base_url}/{program}.fcgi"
        for attempt in range(ATTEMPTS):
            try:
                return self._ask_once(url, parameters, read)
            except _Fault as error:
                fault = error
            if attempt + 1 < ATTEMPTS:
                seconds = BACKOFF_SECONDS * 2**attempt if fault.seconds is None else fault.seconds
                logger.warning("%s: %s, asking again in %g seconds", url, fault, seconds)
                time.sleep(seconds)
        raise OSError(f"cannot ask {url} ({fault}): give the same command again to go on from here")

    def _ask_once(self, url: str, parameters: dict[str, Any], read: Callable[[bytes], T]) -> T:
        time.sleep(max(0.0, self.next_time - time.monotonic()))
        self.next_time = time.monotonic() + self.interval
        try:
            response = self.session.post(url, data=self.who | parameters, timeout=TIMEOUT_SECONDS)
        except requests.RequestException as error:
            raise _Fault(type(error).__name__) from error  # the text of these is long
        if response.status_code == 429 or response.status_code >= 500:
            after = response.headers.get("Retry-After", "")
            raise _Fault(f"status {response.status_code}", int(after) if after.isdigit() else None)
        if (
            response.status_code == 400 and b"ID list is empty" in response.content
        ):  # there is no article of these PMIDs
            return read(b"<PubmedArticleSet/>")
        if response.status_code != 200:
            raise OSError(f"{url} refuses: {_said(response.content) or f'status {response.status_code}'}")
        try:
            return read(response.content)
        except (ElementTree.ParseError, ValueError) as error:
            raise _Fault(_said(response.content) or f"no whole answer, {error}") from error


class _Fault(Exception):
    """What may pass; `seconds` is how long the server wants to be left alone, if it says so."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


def _said(content: bytes) -> str:
    """Return the error that an answer tells of, in XML or in JSON, or ""."""
    found = _ERROR.search(content)
    return " ".join(found[1].decode(errors="replace").split()) if found else ""


def _read_search(content: bytes) -> ElementTree.Element:
    answer = ElementTree.fromstring(content)
    if answer.find("IdList") is None or answer.find("ERROR") is not None:
        raise ValueError(f"<{answer.tag}> is no list")
    return answer


def _read_articles(content: bytes) -> dict[str, dict[str, Any]]:
    return {row["pmid"]: row for row in read_xml(io.BytesIO(content))}
