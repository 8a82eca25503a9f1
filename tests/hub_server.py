"""A small Hugging Face Hub on loopback: real HTTP for the real client, with faults on demand and a log.

It speaks what ``huggingface_hub`` uses to read and publish models: model info, trees, ranged and redirected
downloads, repositories, branches, LFS uploads (single and multipart), commits, pull requests, collections. Files
too large for git are served from, and uploaded to, a second port: another origin, like the Hub's storage, so that a
credential sent there is seen in the log. Contents are kept in a folder by their SHA-256; the rest is in memory.

    with Hub(folder) as hub:
        hub.add_model("org/name", folder_of_a_model)
        hub.fail("GET", "/blobs/", drop_after=1000)
        run(env={**os.environ, **hub.env})
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_loopbackWriteTokenNobodyMaySee42"
READ_TOKEN = "hf_loopbackReadTokenNobodyMaySee17"
USER = "someone"
DATE = "2025-01-02T03:04:05.000Z"
GITATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in (".safetensors", ".bin", ".gguf")
)
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".h5", ".npz")
LARGEST_REGULAR_FILE = 10_000_000
BLOCK = 1 << 16


@dataclass(frozen=True)
class Entry:
    """A file of a commit: where its content is, and what git calls it."""

    sha256: str
    size: int
    blob_id: str
    lfs: bool


@dataclass
class Repo:
    """A model repository: branches and pull requests name commits, commits name files."""

    private: bool = False
    gated: str | bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pull_requests: int = 0


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests of ``method`` whose path (with query) contains ``path``.

    ``status`` answers that, with ``headers``. ``drop_after`` cuts the connection after so many bytes of the answer's
    body, or of the request's body where it has one. ``etag`` is sent in place of the file's. ``bytes_per_second``
    slows the answer's body.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    etag: str | None = None
    bytes_per_second: float | None = None


@dataclass
class Request:
    """One line of the log. ``path`` has the query; ``received`` and ``sent`` count bytes of the bodies."""

    method: str
    path: str
    range: str | None
    authorized: bool
    storage: bool
    status: int = 0
    received: int = 0
    sent: int = 0
    dropped: bool = False


class DroppedError(Exception):
    """The connection was cut on purpose."""


class RefusedError(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Hub:
    """The server, its repositories, faults and log. Fields may be changed while it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.main = _listen(self, storage=False)
        self.storage = _listen(self, storage=True)
        self.url = f"http://127.0.0.1:{self.main.server_port}"
        # Another name as well as another port: clients before 2.0 tell hosts apart by name alone.
        self.storage_url = f"http://localhost:{self.storage.server_port}"
        self.reset()

    def reset(self) -> None:
        """Forget everything: repositories, contents, collections, faults, log."""
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, list[str]] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.page_size = 1000  # entries of a tree per page
        self.part_bytes = 5_000_000  # larger files are uploaded in parts of this size
        self.roles = {TOKEN: "write", READ_TOKEN: "read"}
        self.namespaces = {USER, "org"}  # where the write token may write
        self.approved = {TOKEN}  # tokens let into gated repositories
        self.drop_rate = 0.0  # share of requests cut at random
        self.random = random.Random(0)
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Hub:
        for server in (self.main, self.storage):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.main, self.storage):
            server.shutdown()
            server.server_close()

    @property
    def env(self) -> dict[str, str]:
        """Environment of a process that is to use this Hub, logged in with write rights."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(self.folder / "home"),
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    # -- what tests do to it

    def add_model(self, repo_id: str, source: Path | Mapping[str, bytes], **about: Any) -> str:
        """Put a folder, or contents by path, on ``main`` of a repository (new where need be); the commit's id.

        ``about`` sets fields of the Repo, such as ``private=True`` or ``gated="manual"``.
        """
        if isinstance(source, Path):
            source = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
        repo = self.repos.get(repo_id) or self.create(repo_id)
        for name, value in about.items():
            setattr(repo, name, value)
        files = dict(repo.commits[repo.refs["main"]])
        files |= {path: self.entry(path, content) for path, content in source.items()}
        return self.commit(repo, "main", files, "added")

    def fail(self, method: str, path: str, **what: Any) -> Fault:
        """Make coming requests fail: see Fault. The first fault that fits a request is used."""
        fault = Fault(method, path, **what)
        self.faults.append(fault)
        return fault

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        repo = self.repos[repo_id]
        entries = repo.commits[repo.refs.get(revision, revision)]
        return {path: self.blob(entry.sha256).read_bytes() for path, entry in entries.items()}

    def requests(self, method: str = "", path: str = "") -> list[Request]:
        """The log's requests of a method (any where empty) whose path contains ``path``."""
        return [r for r in list(self.log) if r.method.startswith(method) and path in r.path]

    # -- storage

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private=private)
        self.commit(repo, "main", {".gitattributes": self.entry(".gitattributes", GITATTRIBUTES.encode())}, "initial")
        return repo

    def commit(self, repo: Repo, ref: str, files: dict[str, Entry], message: str) -> str:
        number = sum(len(each.commits) for each in self.repos.values())
        oid = hashlib.sha1(f"{number} {ref} {message} {sorted(files.items())}".encode()).hexdigest()
        repo.commits[oid] = files
        repo.refs[ref] = oid
        repo.messages.append(message)
        return oid

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def entry(self, path: str, content: bytes) -> Entry:
        sha256 = self.keep(content)
        return self.stored_entry(sha256, lfs=goes_to_lfs(path, len(content), content[:512]))

    def keep(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        temporary = self.blob(f"{sha256}.{threading.get_ident()}")
        temporary.write_bytes(content)
        temporary.replace(self.blob(sha256))
        return sha256

    def stored_entry(self, sha256: str, *, lfs: bool) -> Entry:
        size = self.blob(sha256).stat().st_size
        if lfs:
            tracked = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        else:
            tracked = self.blob(sha256).read_bytes()
        return Entry(sha256, size, hashlib.sha1(b"blob %d\0" % len(tracked) + tracked).hexdigest(), lfs)

    # -- looking things up, with the Hub's refusals

    def repo(self, repo_id: str, token: str | None) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is not None and not (repo.private and self.roles.get(token or "") is None):
            return repo
        if token is None:
            # The Hub does not say to a stranger whether a repository exists.
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        raise RefusedError(404, "Repository not found", "RepoNotFound")

    def revision(self, repo: Repo, revision: str) -> tuple[str, dict[str, Entry]]:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    def writable(self, repo_id: str, token: str | None) -> None:
        if token is None:
            raise RefusedError(401, "Invalid username or password.")
        if self.roles[token] != "write" or repo_id.partition("/")[0] not in self.namespaces:
            message = f"Forbidden: you don't have the necessary rights to write to {repo_id}"
            raise RefusedError(403, message)


def fetched_weights(hub: Hub) -> list[str]:
    """Blobs that were sent whole, in order."""
    return [r.path for r in hub.requests("GET", "/blobs/") if r.range is None and r.status == 200]


def goes_to_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps a file outside git: weights by name, whatever is large, whatever is binary."""
    return path.endswith(LFS_SUFFIXES) or size > LARGEST_REGULAR_FILE or b"\0" in sample


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client that went away is no fault of a test.
    handle_error = lambda self, request, client_address: None  # noqa: E731
    hub: Hub
    is_storage: bool


def _listen(hub: Hub, *, storage: bool) -> _Server:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub, server.is_storage = hub, storage
    return server


REPO = r"(?P<repo>[^/]+/[^/]+|[^/]+)"
ROUTES = tuple(
    (method, re.compile(pattern), name)
    for method, pattern, name in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/models", "search"),
        ("GET", rf"/api/models/{REPO}/refs", "refs"),
        ("GET", rf"/api/models/{REPO}/auth-check", "auth_check"),
        ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", "info"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", rf"/api/models/{REPO}", "info"),
        ("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "take_commit"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("DELETE", r"/api/repos/delete", "delete_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", "lfs_verify"),
        ("POST", r"/api/complete_multipart/(?P<sha256>[0-9a-f]{64})", "complete_multipart"),
        ("PUT", r"/uploads/(?P<sha256>[0-9a-f]{64})(?:/(?P<part>\d+))?", "take_upload"),
        ("GET", r"/blobs/(?P<sha256>[0-9a-f]{64})", "send_blob"),
        ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/api/collections/(?P<slug>.+)", "collection"),
        ("POST", r"/api/collections/(?P<slug>.+)/items", "add_to_collection"),
    )
)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: without this, the second waits for the client's delayed acknowledgement.
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    # -- one request

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        self.hub = self.server.hub
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        header = self.headers.get("Authorization")
        self.token = header.removeprefix("Bearer ") if header else None
        self.entry_log = Request(
            self.command, self.path, self.headers.get("Range"), header is not None, self.server.is_storage
        )
        with self.hub.lock:
            self.hub.log.append(self.entry_log)
            self.fault = self.next_fault()
        try:
            body = self.read_body()
            self.route(url.path, body)
        except RefusedError as refusal:
            self.send_json({"error": refusal.message}, refusal.status, refusal.headers)
        except (DroppedError, ConnectionError):
            self.cut()

    def next_fault(self) -> Fault | None:
        """The fault meant for this request, used up by it."""
        for fault in self.hub.faults:
            if fault.times > 0 and self.command == fault.method and fault.path in unquote(self.path):
                fault.times -= 1
                return fault
        if self.hub.random.random() < self.hub.drop_rate:
            return Fault(self.command, self.path, drop_after=int(10 ** self.hub.random.uniform(0, 5)))
        return None

    def read_body(self) -> bytes:
        pieces: list[bytes] = []
        for piece in self.body_pieces():
            pieces.append(piece)
            self.entry_log.received += len(piece)
            if self.command in ("PUT", "POST"):
                self.drop_at(self.entry_log.received)
        if self.fault and self.fault.status:
            raise RefusedError(self.fault.status, "as asked for", **self.fault.headers)
        return b"".join(pieces)

    def body_pieces(self) -> Iterable[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, BLOCK))
            if not piece:
                raise DroppedError
            left -= len(piece)
            yield piece

    def drop_at(self, count: int) -> None:
        if self.fault and self.fault.drop_after is not None and count >= self.fault.drop_after:
            raise DroppedError

    def cut(self) -> None:
        """Close with a reset, as a connection that broke."""
        self.close_connection = True
        self.entry_log.dropped = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)

    def route(self, path: str, body: bytes) -> None:
        if self.token is not None and self.token not in self.hub.roles:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        wanted = "GET" if self.command == "HEAD" else self.command
        for method, pattern, name in ROUTES:
            if method == wanted and (found := pattern.fullmatch(path)):
                arguments = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                getattr(self, name)(body, **arguments)
                return
        raise RefusedError(404, f"Sorry, we can't find the page you are looking for: {path}")

    # -- answers

    def send_json(self, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(data).encode()
        self.send_head(status, len(content), {"Content-Type": "application/json", **(headers or {})})
        self.send_pieces([content])

    def send_head(self, status: int, size: int, headers: Mapping[str, str]) -> None:
        self.entry_log.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_pieces(self, pieces: Iterable[bytes]) -> None:
        if self.command == "HEAD":
            return
        for piece in pieces:
            allowed = piece
            if self.fault and self.fault.drop_after is not None:
                allowed = piece[: max(0, self.fault.drop_after - self.entry_log.sent)]
            self.wfile.write(allowed)
            self.entry_log.sent += len(allowed)
            if len(allowed) < len(piece):
                self.wfile.flush()
                # The client may read what was sent before it meets the end.
                self.connection.shutdown(socket.SHUT_WR)
                raise DroppedError
            if self.fault and self.fault.bytes_per_second:
                time.sleep(len(piece) / self.fault.bytes_per_second)

    def send_file(self, file: Path, etag: str, headers: Mapping[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        size = file.stat().st_size
        first, last, status = 0, size - 1, 200
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            start, end = found.groups()
            first = int(start) if start else max(0, size - int(end))
            last = min(int(end), size - 1) if start and end else size - 1
            status = 206
            if first >= size:
                raise RefusedError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
        about = {
            "ETag": f'"{self.etag(etag)}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            **headers,
        }
        if status == 206:
            about["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.send_head(status, last - first + 1, about)
        with file.open("rb") as opened:
            opened.seek(first)
            self.send_pieces(_pieces(opened, last - first + 1))

    def etag(self, true: str) -> str:
        return self.fault.etag if self.fault and self.fault.etag else true

    # -- reading

    def whoami(self, _: bytes) -> None:
        if self.token is None:
            raise RefusedError(401, "Invalid username or password.")
        role = self.hub.roles[self.token]
        self.send_json(
            {
                "type": "user",
                "id": "1",
                "name": USER,
                "fullname": USER,
                "orgs": [{"type": "org", "name": n} for n in sorted(self.hub.namespaces - {USER})],
                "auth": {"type": "access_token", "accessToken": {"displayName": "loopback", "role": role}},
            }
        )

    def search(self, _: bytes) -> None:
        asked = self.query.get("search", "").lower()
        author = self.query.get("author")
        ids = [
            repo_id
            for repo_id, repo in self.hub.repos.items()
            if asked in repo_id.lower() and not repo.private and author in (None, repo_id.partition("/")[0])
        ]
        self.send_json([{"id": repo_id, "modelId": repo_id} for repo_id in ids[: int(self.query.get("limit", 100))]])

    def info(self, _: bytes, repo: str, revision: str = "main") -> None:
        found = self.hub.repo(repo, self.token)
        oid, files = self.hub.revision(found, revision)
        card = _front_matter(self.hub.blob(files["README.md"].sha256).read_bytes()) if "README.md" in files else {}
        blobs = self.query.get("blobs", "").lower() in ("true", "1")
        self.send_json(
            {
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": oid,
                "lastModified": DATE,
                "createdAt": DATE,
                "private": found.private,
                "gated": found.gated,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": list(card.get("tags") or ()),
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "siblings": [_sibling(path, entry, blobs=blobs) for path, entry in sorted(files.items())],
            }
        )

    def auth_check(self, _: bytes, repo: str) -> None:
        self.admit(self.hub.repo(repo, self.token))
        self.send_json({})

    def admit(self, repo: Repo) -> None:
        """Refuse whoever was not let into a gated repository."""
        if repo.gated and self.token not in self.hub.approved:
            message = "Access to this model is restricted. You must have access to it and be authenticated."
            raise RefusedError(401 if self.token is None else 403, message, "GatedRepo")

    def refs(self, _: bytes, repo: str) -> None:
        listed = [(name, oid) for name, oid in self.hub.repo(repo, self.token).refs.items()]
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": o} for n, o in listed if "/pr/" not in n]
        requests = [{"name": n, "ref": n, "targetCommit": o} for n, o in listed if "/pr/" in n]
        self.send_json({"branches": branches, "converts": [], "tags": [], "pullRequests": requests})

    def tree(self, _: bytes, repo: str, revision: str, path: str = "") -> None:
        files = self.hub.revision(self.hub.repo(repo, self.token), revision)[1]
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries = _tree(files, path, recursive=recursive)
        if path and not entries:
            raise RefusedError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        end = start + min(self.hub.page_size, int(self.query.get("limit", self.hub.page_size)))
        headers = {}
        if end < len(entries):
            query = f"recursive={recursive}&cursor={end}"
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'
        self.send_json(entries[start:end], headers=headers)

    def paths_info(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.revision(self.hub.repo(repo, self.token), revision)[1]
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode()).get("paths", [])
        self.send_json([e for e in _tree(files, "", recursive=True) if e["path"] in paths])

    def resolve(self, _: bytes, repo: str, revision: str, path: str) -> None:
        found = self.hub.repo(repo, self.token)
        self.admit(found)
        oid, files = self.hub.revision(found, revision)
        if path not in files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        entry = files[path]
        about = {"X-Repo-Commit": oid}
        if not entry.lfs:
            self.send_file(self.hub.blob(entry.sha256), entry.blob_id, about)
            return
        about |= {
            "X-Linked-Etag": f'"{self.etag(entry.sha256)}"',
            "X-Linked-Size": str(entry.size),
            "Location": f"{self.hub.storage_url}/blobs/{entry.sha256}?signature=once",
        }
        self.send_head(302, 0, about)

    def send_blob(self, _: bytes, sha256: str) -> None:
        self.send_file(self.hub.blob(sha256), sha256, {})

    # -- publishing

    def create_repo(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        self.hub.writable(repo_id, self.token)
        with self.hub.lock:
            if repo_id in self.hub.repos:
                # The client reads the address even then.
                self.send_json(
                    {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409
                )
                return
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.create(repo_id, private=private)
        self.send_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def delete_repo(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        self.hub.repo(repo_id, self.token)
        self.hub.writable(repo_id, self.token)
        del self.hub.repos[repo_id]
        self.send_json({})

    def create_branch(self, body: bytes, repo: str, branch: str) -> None:
        found = self.hub.repo(repo, self.token)
        self.hub.writable(repo, self.token)
        if branch in found.refs:
            raise RefusedError(409, f"Reference {branch} already exists")
        start = (json.loads(body) if body else {}).get("startingPoint", "main")
        found.refs[branch] = self.hub.revision(found, start)[0]
        self.send_json({})

    def validate_yaml(self, body: bytes) -> None:
        import yaml

        try:
            _front_matter(json.loads(body)["content"].encode())
        except yaml.YAMLError as error:
            self.send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        found = self.hub.repo(repo, self.token)
        if "create_pr" not in self.query:
            self.hub.writable(repo, self.token)
        files = self.hub.revision(found, revision)[1]
        answers = []
        for asked in json.loads(body)["files"]:
            path, entry = asked["path"], files.get(asked["path"])
            lfs = goes_to_lfs(path, asked["size"], base64.b64decode(asked["sample"]))
            known = {"oid": entry.sha256 if entry.lfs else entry.blob_id} if entry else {}
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known})
        self.send_json({"files": answers, "commitOid": found.refs.get(revision, revision)})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self.hub.repo(repo, self.token)
        if self.token is None:
            raise RefusedError(401, "Invalid username or password.")
        objects = [self.lfs_object(repo, asked) for asked in json.loads(body)["objects"]]
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_object(self, repo: str, asked: dict[str, Any]) -> dict[str, Any]:
        """How to upload an object; no actions where it is here already."""
        sha256, size = asked["oid"], asked["size"]
        answer: dict[str, Any] = {"oid": sha256, "size": size, "authenticated": True}
        if self.hub.blob(sha256).exists():
            return answer
        target = f"{self.hub.storage_url}/uploads/{sha256}"
        upload: dict[str, Any] = {"href": target}
        if size > self.hub.part_bytes:
            parts = range(1, -(-size // self.hub.part_bytes) + 1)
            header = {"chunk_size": str(self.hub.part_bytes), **{str(n): f"{target}/{n}" for n in parts}}
            upload = {"href": f"{self.hub.url}/api/complete_multipart/{sha256}", "header": header}
        verify = {"href": f"{self.hub.url}/{quote(repo)}.git/info/lfs/objects/verify"}
        return {**answer, "actions": {"upload": upload, "verify": verify}}

    def take_upload(self, body: bytes, sha256: str, part: str | None = None) -> None:
        etag = hashlib.md5(body).hexdigest()
        if part is not None:
            with self.hub.lock:
                self.hub.parts.setdefault(sha256, {})[int(part)] = body
        elif hashlib.sha256(body).hexdigest() != sha256:
            raise RefusedError(400, "the content is not what its hash says")
        else:
            self.hub.keep(body)
        self.send_json({}, headers={"ETag": f'"{etag}"'})

    def complete_multipart(self, body: bytes, sha256: str) -> None:
        if self.hub.blob(sha256).exists():
            # Asked again because the first answer was lost.
            self.send_json({})
            return
        parts = self.hub.parts.get(sha256, {})
        listed = [(p["partNumber"], p["etag"].strip('"')) for p in json.loads(body)["parts"]]
        here = [(n, hashlib.md5(parts[n]).hexdigest()) for n in sorted(parts)]
        content = b"".join(parts[n] for n in sorted(parts))
        if listed != here or hashlib.sha256(content).hexdigest() != sha256:
            raise RefusedError(400, "the parts do not make up the object")
        self.hub.keep(content)
        self.hub.parts.pop(sha256, None)
        self.send_json({})

    def lfs_verify(self, body: bytes, repo: str) -> None:
        asked = json.loads(body)
        blob = self.hub.blob(asked["oid"])
        if not blob.exists() or blob.stat().st_size != asked["size"]:
            raise RefusedError(404, f"object {asked['oid']} was not uploaded to {repo}")
        self.send_json({})

    def take_commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self.hub.repo(repo, self.token)
        create_pr = "create_pr" in self.query
        if self.token is None:
            raise RefusedError(401, "Invalid username or password.")
        if not create_pr:
            self.hub.writable(repo, self.token)
        with self.hub.lock:
            base, current = self.hub.revision(found, revision)
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            header = lines[0]["value"]
            if header.get("parentCommit", base) != base:
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(current)
            for line in lines[1:]:
                self.apply(files, line["key"], line["value"])
            target = revision
            if create_pr:
                found.pull_requests += 1
                target = f"refs/pr/{found.pull_requests}"
            oid = self.hub.commit(found, target, files, header["summary"])
        discussion = f"{self.hub.url}/{repo}/discussions/{found.pull_requests}" if create_pr else None
        self.send_json(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}",
                "pullRequestUrl": discussion,
            }
        )

    def apply(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = self.hub.stored_entry(self.hub.keep(base64.b64decode(value["content"])), lfs=False)
        elif key == "lfsFile":
            if not self.hub.blob(value["oid"]).exists():
                raise RefusedError(400, f"{path} points to an object that was never uploaded")
            files[path] = self.hub.stored_entry(value["oid"], lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for inside in fnmatch.filter(list(files), f"{path.rstrip('/')}/*"):
                del files[inside]
        else:
            raise RefusedError(400, f"unknown operation {key}")

    def collection(self, _: bytes, slug: str) -> None:
        self.send_json(self.collection_facts(slug))

    def add_to_collection(self, body: bytes, slug: str) -> None:
        self.hub.writable(slug, self.token)
        item = json.loads(body)["item"]["id"]
        self.collection_facts(slug)
        if item in self.hub.collections[slug]:
            raise RefusedError(409, "The item is already in the collection")
        self.hub.collections[slug].append(item)
        self.send_json(self.collection_facts(slug))

    def collection_facts(self, slug: str) -> dict[str, Any]:
        if slug not in self.hub.collections:
            raise RefusedError(404, "Collection not found")
        items = [
            {"_id": str(n), "id": item, "type": "model", "position": n}
            for n, item in enumerate(self.hub.collections[slug])
        ]
        return {
            "slug": slug,
            "title": slug,
            "owner": {"name": slug.partition("/")[0]},
            "items": items,
            "lastUpdated": DATE,
            "position": 0,
            "private": False,
            "theme": "blue",
            "upvotes": 0,
        }


def _pieces(file: BinaryIO, size: int) -> Iterable[bytes]:
    while size > 0 and (piece := file.read(min(BLOCK, size))):
        size -= len(piece)
        yield piece


def _lfs_facts(entry: Entry) -> dict[str, Any]:
    return {"lfs": {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": 134}}


def _sibling(path: str, entry: Entry, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    about = {"rfilename": path, "size": entry.size, "blobId": entry.blob_id}
    return {**about, **_lfs_facts(entry)} if entry.lfs else about


def _tree(files: Mapping[str, Entry], path: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders under ``path``, as the Hub lists them."""
    prefix = f"{path.rstrip('/')}/" if path else ""
    folders: set[str] = set()
    listed = []
    for name, entry in sorted(files.items()):
        if not name.startswith(prefix):
            continue
        inner = name[len(prefix) :].split("/")
        folders |= {
            prefix + "/".join(inner[:depth]) for depth in range(1, len(inner) if recursive else min(2, len(inner)))
        }
        if recursive or len(inner) == 1:
            about = {"type": "file", "path": name, "size": entry.size, "oid": entry.blob_id}
            listed.append({**about, **_lfs_facts(entry)} if entry.lfs else about)
    named = [{"type": "directory", "path": f, "size": 0, "oid": hashlib.sha1(f.encode()).hexdigest()} for f in folders]
    return sorted([*listed, *named], key=lambda entry: entry["path"])


def _front_matter(card: bytes) -> dict[str, Any]:
    import yaml

    found = re.match(rb"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    loaded = yaml.safe_load(found[1]) if found else None
    return loaded if isinstance(loaded, dict) else {}
