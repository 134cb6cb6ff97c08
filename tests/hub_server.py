"""A Hugging Face Hub on the loopback interface: model repos in memory, behind the requests of `huggingface_hub`.

    with HubServer({"hf_writer": ("alice", "write"), "hf_reader": ("bob", "read")}) as hub:
        subprocess.run([sys.executable, "publish.py"], env=hub.environment("hf_writer", home), check=True)
        hub.files("alice/model", revision="main")  # {path: bytes}

Left out: datasets and Spaces, Xet storage, multipart uploads, tags, deletion of repos and branches, .gitignore.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".png")
LFS_BINARY_SIZE, LFS_SIZE = 10_000, 10_000_000  # bytes above which a file with a NUL, and any, goes to LFS
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LICENSES = {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc0-1.0", "mit", "other"}
LICENSES |= {"unknown"}
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


class Answer(Exception):
    """What is sent, as JSON unless bytes; an answer without a status cuts the connection."""

    def __init__(self, status: int | None, content: Any, headers: Mapping[str, str] = {}):
        self.status, self.headers = status, headers
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()


def error(status: int | None, message: str, code: str | None = None, headers: Mapping[str, str] = {}) -> Answer:
    """Return an answer to raise, with the headers by which the client tells errors apart."""
    codes = {"X-Error-Code": code} if code else {}
    return Answer(status, {"error": message}, {"X-Error-Message": message, **codes, **headers})


class File(NamedTuple):
    """The content of a file and whether LFS keeps it."""

    data: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """The SHA-256 with LFS, else the SHA-1 that git gives."""
        return (sha256(self.data) if self.lfs else sha1(b"blob %d\0" % len(self.data) + self.data)).hexdigest()


@dataclass
class Repo:
    """A repo; a commit's id is the key to its files, and an LFS object's SHA-256 to its bytes."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    pull_requests: dict[str, str] = field(default_factory=dict)  # refs/pr/N -> commit
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def head(self, revision: str | None) -> str:
        """Return the commit that a branch, `refs/pr/N` or a commit's id names; None is main."""
        commit = {**self.branches, **self.pull_requests}.get(revision or "main", revision)
        if commit not in self.commits:
            raise error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, message: str, files: dict[str, File]) -> str:
        """Add a commit, to which no ref points yet, and return its id."""
        state = [message, len(self.commits), {path: file.etag for path, file in sorted(files.items())}]
        commit = sha1(json.dumps(state).encode()).hexdigest()
        self.commits[commit] = files
        return commit


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    """Return whether a file of `size` bytes that begins with `sample` goes to LFS."""
    return path.endswith(LFS_SUFFIXES) or size > (LFS_BINARY_SIZE if b"\0" in sample else LFS_SIZE)


def check_card(content: str) -> dict[str, list[dict[str, str]]]:
    """Return the errors and warnings of the metadata of a model card."""
    match, empty = FRONT_MATTER.search(content), {"message": "empty or missing yaml metadata in repo card"}
    try:
        metadata = yaml.safe_load(match[1]) if match else None
        if not isinstance(metadata, dict | None):
            raise ValueError("Metadata must be a mapping")
        licenses = (metadata or {}).get("license", [])
        if unknown := {str(name) for name in (licenses if isinstance(licenses, list) else [licenses])} - LICENSES:
            raise ValueError(f'"license" must be one of {sorted(LICENSES)}, not {unknown}')
    except (yaml.YAMLError, ValueError) as invalid:
        return {"errors": [{"message": str(invalid)}], "warnings": []}
    return {"errors": [], "warnings": [] if metadata else [empty]}


def change(repo: Repo, files: dict[str, File], key: str, path: str, content: str = "", oid: str = "", **_) -> None:
    """Apply one operation of a commit to `files`."""
    deleted = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
    if key == "file":
        files[path] = File(base64.b64decode(content), lfs=False)
        if path == "README.md" and (errors := check_card(files[path].data.decode())["errors"]):
            raise error(400, f"Invalid metadata in README.md: {errors[0]['message']}")
    elif key == "lfsFile":
        if oid not in repo.objects:
            raise error(400, f"LFS pointer of {path} points to an object that does not exist")
        files[path] = File(repo.objects[oid], lfs=True)
    elif not deleted:
        raise error(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    for name in deleted if key.startswith("deleted") else ():
        del files[name]


class Handler(BaseHTTPRequestHandler):
    """A connection. `ROUTES` has the endpoints: methods that return, or raise, an `Answer` or its JSON."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *args) -> None:
        """Write nothing: `HubServer.requests` is the log."""

    def respond(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        with self.server.lock:
            self.server.requests.append((self.command, unquote(path)))
            try:
                answer = self.route(path)
            except Answer as refusal:
                answer = refusal
        self.send(answer if isinstance(answer, Answer) else Answer(200, answer))

    do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = respond

    def route(self, path: str) -> Any:
        for pattern, endpoint in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return endpoint(self, **{name: value and unquote(value) for name, value in match.groupdict().items()})
        raise error(404, f"No such endpoint: {self.command} {path}")

    def send(self, answer: Answer) -> None:
        if answer.status is None or self.server.closed:
            self.close_connection = True
            return
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.content))}
        for name, value in {**headers, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        content = b"" if self.command == "HEAD" else answer.content
        if len(content) > self.server.cut:
            content, self.server.cut, self.close_connection = content[: self.server.cut], sys.maxsize, True
        self.wfile.write(content)

    def account(self) -> tuple[str | None, str | None]:
        """Return the name of the user and the role of the token; None and None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise error(401, "Invalid credentials in Authorization header")
        return self.server.tokens.get(token, (None, None))

    def writer(self, namespace: str | None = None) -> str:
        """Return the name of the user, who must have a write token, and be the owner of `namespace` if given."""
        user, role = self.account()
        if user is None:
            raise error(401, "Invalid username or password.")
        if role != "write" or namespace not in (None, user):
            raise error(403, f"This token has no right to write under the namespace {namespace or user}")
        return user

    def repo(self, repo_id: str, write: bool = False, pull_request: bool = False) -> Repo:
        """Return a repo that the user may read, and write if asked; a pull request does not take its owner."""
        owner, user = repo_id.split("/")[0], self.account()[0]
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and user != owner):
            raise error(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writer(None if pull_request else owner)
        return repo

    def whoami(self) -> dict:
        user, role = self.account()
        if user is None:
            raise error(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}}

    def create_repo(self) -> Answer:
        payload = json.loads(self.body)
        if payload.get("type") not in (None, "model"):
            raise error(400, "Only model repos are served")
        repo_id = f"{self.writer(payload.get('organization'))}/{payload['name']}"
        answer = {"name": repo_id, "url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repos:
            return Answer(409, {"error": "You already created this model repo", **answer})
        self.server.add_repo(repo_id, private=payload.get("private") or payload.get("visibility") == "private")
        return Answer(200, answer)

    def validate_yaml(self) -> Answer:
        messages = check_card(json.loads(self.body)["content"])
        return Answer(400 if messages["errors"] else 200, messages)

    def auth_check(self, repo_id: str, write: str | None) -> dict:
        self.repo(repo_id, bool(write))
        return {"ok": True}

    def model_info(self, repo_id: str, revision: str | None) -> dict:
        repo = self.repo(repo_id)
        commit = repo.head(revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
        for sibling in siblings if "blobs" in self.query else ():
            file = repo.commits[commit][sibling["rfilename"]]
            sibling |= {"size": len(file.data), "blobId": file.etag}
            sibling |= {"lfs": {"sha256": file.etag, "size": len(file.data), "pointerSize": 134}} if file.lfs else {}
        answer = {"id": repo_id, "author": repo_id.split("/")[0], "sha": commit, "siblings": siblings}
        return {**answer, "private": repo.private, "gated": False, "disabled": False, "tags": []}

    def list_refs(self, repo_id: str) -> dict:
        repo = self.repo(repo_id)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
        requests = [{"name": n, "ref": n, "targetCommit": c} for n, c in repo.pull_requests.items()]
        return {"branches": branches, "converts": [], "tags": [], "pullRequests": requests}

    def create_branch(self, repo_id: str, branch: str) -> dict:
        if not re.fullmatch(r"[\w./-]+", branch):
            raise error(400, f"Invalid reference name: {branch}")
        repo = self.repo(repo_id, write=True)
        if branch.startswith("refs/") or branch in repo.branches:
            raise error(409 if branch in repo.branches else 400, f"Reference {branch} already exists or is invalid")
        repo.branches[branch] = repo.head(json.loads(self.body).get("startingPoint"))
        return {}

    def tree(self, repo_id: str, revision: str, folder: str | None) -> list:
        repo, root = self.repo(repo_id), PurePosixPath(folder or "")
        entries = {}
        for name, file in sorted(repo.commits[repo.head(revision)].items()):
            path = PurePosixPath(name)
            if root in path.parents:
                for parent in map(str, path.parents[: len(path.relative_to(root).parts) - 1]):
                    entries[parent] = {"type": "directory", "oid": sha1(parent.encode()).hexdigest(), "path": parent}
                entry = {"type": "file", "oid": file.etag, "size": len(file.data)}
                entries[name] = {**entry, "path": name, **({"lfs": {**entry, "pointerSize": 134}} if file.lfs else {})}
        if folder and not entries:
            raise error(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", [""])[0].lower() in ("1", "true")
        return [entry for name, entry in entries.items() if recursive or PurePosixPath(name).parent == root]

    def preupload(self, repo_id: str, revision: str) -> dict:
        repo = self.repo(repo_id, write=True, pull_request="create_pr" in self.query)
        present = repo.commits[repo.head(revision)]
        answer = []
        for entry in json.loads(self.body)["files"]:
            path = entry["path"]
            mode = "lfs" if is_lfs(path, base64.b64decode(entry["sample"]), entry["size"]) else "regular"
            oid = present[path].etag if path in present else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, repo_id: str) -> dict:
        # The request does not say whether it is for a pull request, which users may open who do not own the repo.
        repo = self.repo(repo_id, write=True, pull_request=True)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in repo.objects:
                href = f"{self.server.url}/{repo_id}.git/info/lfs/objects"
                entry["actions"] = {"upload": {"href": f"{href}/{entry['oid']}"}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, repo_id: str, oid: str) -> Answer:
        # Without a token: the address that `lfs_batch` gave stands for a signed one.
        if (status := next(self.server.upload_statuses, 200)) != 200:
            raise error(status, "Injected fault")
        if sha256(self.body).hexdigest() != oid:
            raise error(400, f"Content does not have the SHA-256 {oid}")
        self.server.repos[repo_id].objects[oid] = self.body
        return Answer(200, b"")

    def lfs_verify(self, repo_id: str) -> dict:
        repo, entry = self.repo(repo_id, write=True, pull_request=True), json.loads(self.body)
        if len(repo.objects.get(entry["oid"], b"")) != entry["size"]:
            raise error(404, f"Object {entry['oid']} was not received")
        return {}

    def commit(self, repo_id: str, revision: str) -> dict:
        pull_request = "create_pr" in self.query
        repo = self.repo(repo_id, write=True, pull_request=pull_request)
        header, *operations = map(json.loads, self.body.splitlines())
        refs = repo.branches if pull_request or revision in repo.branches else repo.pull_requests
        if revision not in refs:
            raise error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if not refs[revision].startswith(header["value"].get("parentCommit", "")):
            raise error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[refs[revision]])
        for operation in operations:
            change(repo, files, operation["key"], **operation["value"])
        commit, base = repo.commit(header["value"]["summary"], files), f"{self.server.url}/{repo_id}"
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{base}/commit/{commit}"}
        if pull_request:
            number = len(repo.pull_requests) + 1
            refs, revision = repo.pull_requests, f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{base}/discussions/{number}"
        refs[revision] = commit
        return answer

    def resolve(self, repo_id: str, revision: str, path: str) -> Answer:
        repo = self.repo(repo_id)
        commit = repo.head(revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in repo.commits[commit]:
            raise error(404, f"{path} does not exist on {revision}", "EntryNotFound", headers)
        data, lfs = file = repo.commits[commit][path]
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))} if lfs else {}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return Answer(200, data, headers)
        self.server.ranges.append((path, match[0]))
        start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
        if start >= stop:
            raise error(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        return Answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


REPO, REVISION = "(?P<repo_id>[^/]+/[^/]+?)", "(?P<revision>[^/]+)"
MODEL, LFS = f"/api/models/{REPO}", rf"/{REPO}\.git/info/lfs/objects"
ROUTES = {
    "GET /api/whoami-v2": Handler.whoami,
    "POST /api/repos/create": Handler.create_repo,
    "POST /api/validate-yaml": Handler.validate_yaml,
    f"GET {MODEL}(?:/revision/{REVISION})?": Handler.model_info,
    f"GET {MODEL}/auth-check(?P<write>/write)?": Handler.auth_check,
    f"GET {MODEL}/refs": Handler.list_refs,
    f"POST {MODEL}/branch/(?P<branch>[^/]+)": Handler.create_branch,
    f"GET {MODEL}/tree/{REVISION}(?:/(?P<folder>.+))?": Handler.tree,
    f"POST {MODEL}/preupload/{REVISION}": Handler.preupload,
    f"POST {MODEL}/commit/{REVISION}": Handler.commit,
    f"POST {LFS}/batch": Handler.lfs_batch,
    f"POST {LFS}/verify": Handler.lfs_verify,
    f"PUT {LFS}/(?P<oid>[0-9a-f]{{64}})": Handler.lfs_put,
    f"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)": Handler.resolve,
}


class HubServer(ThreadingHTTPServer):
    """A Hub, served while its `with` block lasts. `tokens` has (name of the user, "read" or "write") for each token.

    `url` is for HF_ENDPOINT, `repos` has a `Repo` for each id, `requests` the (method, path) of each request in order,
    and `ranges` the (file, Range) of requests for a part of a file.
    """

    def __init__(self, tokens: Mapping[str, tuple[str, str]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens, self.repos, self.requests, self.ranges = dict(tokens), {}, [], []
        self.closed, self.lock = False, threading.Lock()
        self.reset_faults()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.closed = True
        self.shutdown()
        self.server_close()

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] = {}, private: bool = False) -> Repo:
        """Add a repo with `files` on its main branch, beside the .gitattributes that each repo starts with."""
        repo = self.repos[repo_id] = Repo(private)
        content = {".gitattributes": GITATTRIBUTES, **files}
        first = {path: File(data, is_lfs(path, data[:512], len(data))) for path, data in content.items()}
        repo.objects = {file.etag: file.data for file in first.values() if file.lfs}
        repo.branches["main"] = repo.commit("initial commit", first)
        return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repo at a branch, a commit or `refs/pr/N`."""
        repo = self.repos[repo_id]
        return {path: file.data for path, file in repo.commits[repo.head(revision)].items()}

    def environment(self, token: str | None, home: str | Path) -> dict[str, str]:
        """Return a whole environment, for a process that knows only this Hub, `token` and the cache in `home`.

        This Hub is also the proxy for all other hosts: it refuses their requests, and has them in its log.
        """
        dropped = re.compile(r"(HF|HUGGING\w+|TRANSFORMERS|DIFFUSERS)_\w+|\w+_proxy", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not dropped.fullmatch(name)}
        proxies = {"http_proxy": self.url, "https_proxy": self.url, "no_proxy": "127.0.0.1"}
        proxies |= {name.upper(): value for name, value in proxies.items()}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        account = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), **({"HF_TOKEN": token} if token else {})}
        return {**kept, **proxies, **switches, **account}

    def fail_uploads_after(self, passes: int, status: int | None = 500, times: int = sys.maxsize) -> None:
        """Let `passes` more PUTs of LFS content through, then fail the next `times`; status None cuts the connection.

        `huggingface_hub` repeats a PUT that was cut or answered by 408, 429 or 5xx five times, over 23 seconds.
        """
        self.upload_statuses = chain(repeat(200, passes), repeat(status, times))

    def cut_download_after(self, size: int) -> None:
        """Cut the connection once, after `size` bytes of the next answer that is larger."""
        self.cut = size

    def reset_faults(self) -> None:
        """Let all uploads and downloads succeed."""
        self.upload_statuses, self.cut = iter(()), sys.maxsize
