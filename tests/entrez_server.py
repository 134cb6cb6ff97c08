"""NCBI's E-utilities on the loopback interface: esearch and efetch over stored articles, with faults on demand.

with EntrezServer(articles) as server:
    fetch_pubmed("cells", "out.jsonl", "me@example.org", base_url=server.url)
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs


_ARTICLE = re.compile(r"<PubmedArticle>.*?</PubmedArticle>", re.DOTALL)
_RANGE = re.compile(r" AND (\d+):(\d+)\[uid\]$")


def stored_articles(folder: Path) -> dict[str, str]:
    """Return the XML of the articles in the files of a folder by their PMID, as they stand there."""
    found = [each for path in sorted(folder.glob("*.xml")) for each in _ARTICLE.findall(path.read_text("utf-8"))]
    return {re.search(r"<PMID[^>]*>(\d+)<", each)[1]: each for each in found}


class EntrezServer(ThreadingHTTPServer):
    """Finds all its articles, or those in a range of PMIDs, but none of a yeti; lists at most `listed` of them.

    Each of `faults` spoils one request: it is called with the handler and returns whether it has answered.
    """

    def __init__(self, articles: dict[str, str], listed: int = 10_000):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.articles, self.listed = articles, listed
        self.faults: list[Callable[[_Handler], bool]] = []
        self.requests: list[tuple[float, str, dict[str, str]]] = []  # when, the program, its parameters
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> EntrezServer:
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    def fetched(self) -> list[str]:
        """Return the PMIDs that were asked for, in order."""
        return [pmid for _, program, given in self.requests if program == "efetch" for pmid in given["id"].split(",")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        given = {name: values[0] for name, values in parse_qs(body).items()}
        program = self.path.strip("/").removesuffix(".fcgi")
        self.server.requests.append((time.monotonic(), program, given))
        if self.server.faults and self.server.faults.pop(0)(self):
            return
        self.answer({"esearch": self.esearch, "efetch": self.efetch}[program](given))

    do_GET = do_POST

    def esearch(self, given: dict[str, str]) -> str:
        within = _RANGE.search(given["term"])
        low, high = map(int, within.groups()) if within else (0, 10**9)
        found = [pmid for pmid in self.server.articles if low <= int(pmid) <= high and "yeti" not in given["term"]]
        found.sort(key=int, reverse=True)
        shown = found[: min(int(given["retmax"]), self.server.listed)]
        missing = "" if found else "<ErrorList><PhraseNotFound>yeti</PhraseNotFound></ErrorList>"
        ids = "".join(f"<Id>{pmid}</Id>" for pmid in shown)
        return f"<eSearchResult><Count>{len(found)}</Count><IdList>{ids}</IdList>{missing}</eSearchResult>"

    def efetch(self, given: dict[str, str]) -> str:
        articles = [self.server.articles[pmid] for pmid in given["id"].split(",") if pmid in self.server.articles]
        return f"<PubmedArticleSet>{''.join(articles)}</PubmedArticleSet>"

    def answer(self, text: str, status: int = 200, **headers: str) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def cut(self, chunked: bool = False) -> None:
        """Send a third of an answer, and close the connection."""
        content = self.efetch({"id": ",".join(self.server.articles)}).encode()
        self.send_response(200)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            content = f"{len(content) // 3:x}\r\n".encode() + content[: len(content) // 3] + b"\r\n"
        else:
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            content = content[: len(content) // 3]
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *args) -> None:
        """Keep quiet."""
