"""A Hugging Face hub on localhost: what a process pushes lands in a directory, what lies in one loads by its id.

    with hub.serve(tmp_path / "hub") as server:
        subprocess.run([sys.executable, "-c", script], env=server.environment(tmp_path / "home"), check=True)

Every directory OWNER/NAME under the root is a model repository with one branch, main; its commit is a hash of the files
that are there now. What only the real hub can do (data sets, branches, pull requests, Xet) is refused with 501.
"""

import json
import os
import threading
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_fake"
USER = "someone"  # the owner of the token, and of what is created without an owner
LARGE = (".safetensors", ".bin", ".gguf", ".model", ".pt")  # sent with LFS; everything else is part of the commit


class HubError(Exception):
    """A refusal: by the reason in its headers the client chooses what to raise, RepositoryNotFoundError for one."""

    def __init__(self, status: int, reason: str, commit: str = "", **content: str):
        headers = {"X-Error-Code": reason, "X-Error-Message": reason, "X-Repo-Commit": commit}
        super().__init__(status, {"error": reason, **content}, headers)


def below(root: Path, *parts: str) -> Path:
    """A place under the root, refused if the parts lead elsewhere."""
    place = root.joinpath(*parts).resolve()
    if root not in place.parents:
        raise HubError(400, "Invalid path")
    return place


def entry(path: str, content: bytes) -> dict:
    """A file in a listing: a large one is identified by its SHA-256, any other by git's SHA-1."""
    size = len(content)
    if not path.endswith(LARGE):
        return {"type": "file", "path": path, "size": size, "oid": sha1(b"blob %d\0" % size + content).hexdigest()}
    lfs = {"size": size, "oid": sha256(content).hexdigest(), "pointerSize": 134}
    return {"type": "file", "path": path, **lfs, "lfs": lfs}


class Repository:
    """The files of a directory as they are now, and what the hub says about them."""

    def __init__(self, directory: Path, revision: str = "main"):
        if not directory.is_dir():
            raise HubError(404, "RepoNotFound")
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        self.directory = directory
        self.files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
        self.entries = {path: entry(path, content) for path, content in self.files.items()}
        self.commit = sha1(json.dumps(self.entries).encode()).hexdigest()
        if revision not in ("main", self.commit):
            raise HubError(404, "RevisionNotFound")

    def info(self) -> dict:
        name = f"{self.directory.parent.name}/{self.directory.name}"
        return {"id": name, "sha": self.commit, "tags": [], "siblings": [{"rfilename": path} for path in self.files]}

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        """The files in a folder, which is empty or ends with a slash; the folders in it are not listed."""
        inside = [path for path in self.files if path.startswith(folder)]
        if folder and not inside:
            raise HubError(404, "EntryNotFound", self.commit)
        return [self.entries[path] for path in inside if recursive or "/" not in path[len(folder) :]]

    def preupload(self, path: str) -> dict:
        """How to send a file, and the hash of the one that is here: the client does not send the same again."""
        mode = "lfs" if path.endswith(LARGE) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": self.entries.get(path, {}).get("oid")}

    def resolve(self, path: str) -> tuple[bytes, dict[str, str]]:
        """A file's content and headers."""
        if path not in self.files:
            raise HubError(404, "EntryNotFound", self.commit)
        return self.files[path], {"X-Repo-Commit": self.commit, "ETag": f'"{self.entries[path]["oid"]}"'}

    def apply(self, operations: list[dict], uploads: dict[str, bytes]) -> None:
        """A whole commit, or nothing of it if one of its operations cannot be done."""
        changes: dict[Path, bytes | None] = {}
        for operation in operations:
            path = below(self.directory, operation["value"]["path"])
            match operation:
                case {"key": "file", "value": {"content": content, "encoding": "base64"}}:
                    changes[path] = b64decode(content)
                case {"key": "lfsFile", "value": {"algo": "sha256", "oid": oid}} if oid in uploads:
                    changes[path] = uploads[oid]
                case {"key": "deletedFile"} if path.is_file():
                    changes[path] = None
                case _:
                    raise HubError(400, f"cannot commit this {operation['key']}")
        for path, content in changes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink() if content is None else path.write_bytes(content)


class Hub(ThreadingHTTPServer):
    """The server: `requests` lists (method, path) of all that it was asked, `unknown` what it could not answer.

    `sent` counts the bytes of each path that it delivered. Owners in `gated` show their models to nobody.
    """

    request_queue_size = 64

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url, self.lock = root.resolve(), f"http://127.0.0.1:{self.server_port}", threading.Lock()
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.uploads: dict[str, bytes] = {}  # large contents by SHA-256
        self.sent: Counter[str] = Counter()
        self.gated: set[str] = set()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that knows this hub only, has its token, and keeps its cache in `home`."""
        others = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(others)}
        quiet = dict.fromkeys(["HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"], "1")
        return {**kept, **quiet, "HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}

    def repository(self, owner: str, name: str, revision: str = "main") -> Repository:
        if owner in self.gated:
            raise HubError(403, "GatedRepo")
        return Repository(below(self.root, owner, name), revision)

    def answer(self, method: str, path: str, query: str, body: bytes) -> Any:
        """JSON, or the content and headers of a file: the whole protocol."""
        match [method, *map(unquote, path.strip("/").split("/"))]:
            case ["POST", "api", "repos", "create"]:
                return self.create(**json.loads(body))
            case ["POST", "api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["GET", "api", "models", owner, name] | ["GET", "api", "models", owner, name, "revision", _] as asked:
                return self.repository(owner, name, *asked[6:]).info()
            case ["GET", "api", "models", owner, name, "tree", revision, *folders]:
                folder = "".join(f"{part}/" for part in folders)
                return self.repository(owner, name, revision).tree(folder, "recursive=true" in query.lower())
            case ["POST", "api", "models", owner, name, "preupload", revision]:
                repository = self.repository(owner, name, revision)
                return {"files": [repository.preupload(file["path"]) for file in json.loads(body)["files"]]}
            case ["POST", _, _, "info", "lfs", "objects", "batch"]:
                files = json.loads(body)["objects"]
                return {
                    "objects": [{**f, "actions": {"upload": {"href": f"{self.url}/lfs/{f['oid']}"}}} for f in files]
                }
            case ["PUT", "lfs", oid] if oid == sha256(body).hexdigest():
                self.uploads[oid] = body
                return {}
            case ["POST", "api", "models", owner, name, "commit", revision] if not query:
                _, *operations = map(json.loads, body.splitlines())
                self.repository(owner, name, revision).apply(operations, self.uploads)
                commit = self.repository(owner, name).commit
                return {"commitOid": commit, "commitUrl": f"{self.url}/{owner}/{name}/commit/{commit}"}
            case [("GET" | "HEAD"), owner, name, "resolve", revision, *parts]:
                return self.repository(owner, name, revision).resolve("/".join(parts))
            case ["GET", "api", "models", *_] | [("GET" | "HEAD"), _, "resolve", *_]:
                raise HubError(404, "RepoNotFound")  # an id without an owner
        self.unknown.append((method, path))
        raise HubError(501, f"this hub does not know {method} {path}")

    def create(self, name: str, organization: str | None = None, type: str = "model", **_: Any) -> dict:
        """A new, empty repository; that it is to be private, say, changes nothing."""
        directory, url = below(self.root, organization or USER, name), f"{self.url}/{organization or USER}/{name}"
        if type != "model" or directory.exists():
            raise HubError(501 if type != "model" else 409, f"cannot create this {type}", url=url)
        directory.mkdir(parents=True)
        return {"url": url}


class Handler(BaseHTTPRequestHandler):
    """HTTP: connections stay open, requests are answered one at a time, and nobody writes without the token."""

    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        url, body = urlsplit(self.path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append((self.command, url.path))
            try:
                if self.command == "POST" and self.headers["Authorization"] != f"Bearer {TOKEN}":
                    raise HubError(401, "Invalid credentials in Authorization header")
                answer = self.server.answer(self.command, url.path, url.query, body)
                status, (content, headers) = 200, answer if isinstance(answer, tuple) else (answer, {})
                if isinstance(answer, tuple) and "Range" in self.headers:
                    status, content, headers = self.part(content, headers)
            except HubError as error:
                status, content, headers = error.args
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.server.sent[url.path] += len(content) if self.command != "HEAD" else 0
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def part(self, content: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        """The bytes of a file that were asked for, the last one included."""
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last or len(content)) + 1]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return 206, part, {**headers, "Content-Range": span}

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Says nothing: a test looks at `requests`."""


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """A hub with the repositories in this directory, for as long as the block lasts."""
    root.mkdir(parents=True, exist_ok=True)
    with Hub(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
