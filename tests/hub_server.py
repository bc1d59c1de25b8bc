"""A local server that speaks what the Hugging Face hub's client and plain downloads ask for: descriptions of models,
their files, ranges and ETags, and commits."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, file_download

COMMIT = "c0ffee" + 34 * "0"
TOKEN = "hf_local"  # that may write


class Server(ThreadingHTTPServer):
    """Serves the models USER/REPO of a folder, and its other files by their paths.

    fetched: how often the content of each file was sent. cut: bytes after which the connection ends, once for each
    entry. gated: models that ask for a consent. commit: the commit of the branch main, whose models all have these
    files. broken: a pattern of paths at which the server fails; with `closes`, by a connection that ends without an
    answer.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fetched: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.cut: list[int] = []
        self.gated: set[str] = set()
        self.commit = COMMIT
        self.broken: str | None = None
        self.closes = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        api = re.fullmatch(r"api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repository = (api or file or [None, None])[1]
        revision = (api[3] if api else file[2] if file else None) or "main"
        if self.server.broken and re.search(self.server.broken, path):
            if not self.server.closes:
                self.fail(500, "")
            self.close_connection = True
        elif repository and not (self.server.folder / repository).is_dir():
            self.fail(404, "RepoNotFound")
        elif repository in self.server.gated and file:
            self.fail(403, "GatedRepo")
        elif revision not in ("main", self.server.commit):
            self.fail(404, "RevisionNotFound")
        elif api:
            self.describe(repository, api[2] == "tree")
        else:
            self.send_file(self.server.folder / (f"{file[1]}/{file[3]}" if file else path))

    def do_POST(self):
        """Takes new models and commits, whose files come inside of the request."""
        path = urlsplit(self.path).path.strip("/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repository = "/".join(path.split("/")[2:4])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.fail(401, "")
        elif path == "api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'lab'}/{wanted['name']}"
            (self.server.folder / name).mkdir(parents=True, exist_ok=True)
            self.answer_json({"url": f"{self.server.url}/{name}"})
        elif "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]
            self.answer_json({"files": files})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    (self.server.folder / repository / line["value"]["path"]).write_bytes(content)
            self.answer_json({"commitUrl": f"{self.server.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer_json({})

    def answer_json(self, content) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def describe(self, repository: str, is_tree: bool) -> None:
        folder = self.server.folder / repository
        files = [(str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*")) if path.is_file()]
        if is_tree:
            content = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
                       for name, path in files]
        else:
            content = {"_id": "1", "id": repository, "modelId": repository, "sha": self.server.commit, "private": False,
                       "siblings": [{"rfilename": name, "size": path.stat().st_size} for name, path in files]}
        self.answer_json(content)

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            self.fail(404, "EntryNotFound")
            return
        content, tag = path.read_bytes(), f'"{etag(path)}"'
        headers = {"ETag": tag, "X-Repo-Commit": self.server.commit, "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.headers.get("If-Range", tag) == tag:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first:last + 1], headers, "" if asked[2] else path.name)
            if not asked[2]:
                self.server.ranges.append(asked[0])
        else:
            self.answer(200, content, headers, path.name)

    def answer(self, status: int, content: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.fetched[name] += 1
        if name and self.server.cut:
            self.wfile.write(content[:self.server.cut.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(content)


def etag(path: Path) -> str:
    """The MD5 of the content, as S3 has it."""
    return hashlib.md5(path.read_bytes()).hexdigest()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def use(url: str, cache: Path, monkeypatch) -> None:
    """Does in this process what HF_ENDPOINT and HF_HUB_CACHE do where one starts."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
