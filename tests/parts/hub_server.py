"""A small Hub on loopback: the endpoints that the `huggingface_hub` client uses, with faults that a test can inject.

    with HubServer() as hub:                      # hub.url is the endpoint
        hub.tokens["secret"] = "someone"          # token -> user; a user may write to repositories of its own name
        hub.faults.append(Fault("500", r"/resolve/.*safetensors", times=1))

Repositories live in memory as commits: {path: bytes}. Files that end in .safetensors are stored as LFS files, which the
real Hub serves from elsewhere by a redirect; so does this one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Fault:
    """What goes wrong on requests whose method and path match; `times=None` means always.

    kind: "500"; "break" (half of the answer, then the connection is cut); "corrupt" (one byte differs).
    """

    kind: str
    path: str
    method: str = "GET"
    times: int | None = None

    def hits(self, method: str, path: str) -> bool:
        if self.times == 0 or method != self.method or not re.search(self.path, path):
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> {path: content}
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        listing = repr(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """The server; a context manager. `requests` lists "METHOD path" of everything that was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Another host, as on the real Hub: the client then sends no token there.
        self.cdn = f"http://localhost:{self.server.server_address[1]}/cdn"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], branch: str = "main", private: bool = False) -> str:
        """Put files into a repository directly; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(private=private))
        return repo.commit(branch, files)

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, line)) for line in self.requests)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fault: str | None = None

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # -- dispatch -----------------------------------------------------------------------------------------------------

    def handle_one(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        body = self.read_body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            self.fault = next((f.kind for f in self.hub.faults if f.hits(self.command, path)), None)
            try:
                if self.fault == "500":
                    raise _Refused(500, "Internal Error")
                self.route(path, query, body)
            except _Refused as refused:
                headers = {"X-Error-Message": refused.message}
                if refused.code:
                    headers["X-Error-Code"] = refused.code
                self.answer(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/whoami-v2":
            return self.json({"name": self.user(), "orgs": []})
        if found := re.fullmatch(r"/(?:lfs|cdn)/([0-9a-f]{64})", path):
            if "authorization" in self.headers:
                raise _Refused(400, "a token was sent to the storage")
            return self.lfs_file(found[1], body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repo(found[1], write=True)
            return self.lfs_batch(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*found.groups())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path):
            return self.model_api(found[1], found[2] or "", found[3] or "", query, body)
        raise _Refused(404, "no such page")

    def model_api(self, repo_id: str, what: str, rest: str, query: dict[str, list[str]], body: bytes) -> None:
        if what in ("", "revision"):
            return self.info(repo_id, rest or "main", "blobs" in query)
        if what == "tree":
            repo, files = self.files(repo_id, rest)
            return self.json([self.entry(name, data) for name, data in files.items()])
        if what == "refs":
            repo = self.repo(repo_id)
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
            return self.json({"branches": branches, "tags": [], "converts": [], "pullRequests": []})
        if what == "preupload":
            return self.preupload(repo_id, rest, json.loads(body))
        if what == "branch":
            repo = self.repo(repo_id, write=True)
            if rest in repo.branches:
                raise _Refused(409, "Reference already exists")
            repo.branches[rest] = repo.branches["main"]
            return self.json({})
        if what == "commit":
            return self.commit(repo_id, rest, body)
        raise _Refused(404, "no such page")

    # -- who may do what ----------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        header = self.headers.get("authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        user = self.user()
        repo = self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            # like the Hub, which does not tell strangers that a private repository exists
            raise _Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise _Refused(401, "Invalid username or password.")
        if write and user != owner:
            raise _Refused(403, "you don't have the rights to write to this repository")
        return repo

    def files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.repo(repo_id)
        commit = repo.resolve(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    # -- writing ------------------------------------------------------------------------------------------------------

    def create(self, wanted: dict[str, Any]) -> None:
        user = self.user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        owner = wanted.get("organization") or user
        repo_id = f"{owner}/{wanted['name']}"
        if owner != user:
            raise _Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        address = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self.json({**address, "error": "You already created this model repo"}, status=409)
        repo = self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.json(address)

    def validate(self, content: str) -> None:
        import yaml

        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(found[1]) if found else None
        if isinstance(data, dict) and isinstance(data.get("tags", []), list):
            return self.json({"errors": [], "warnings": []})
        self.json({"errors": [{"message": "no YAML metadata"}], "warnings": []}, status=400)

    def preupload(self, repo_id: str, revision: str, wanted: dict[str, Any]) -> None:
        self.repo(repo_id, write=True)
        _, files = self.files(repo_id, revision)
        answer = []
        for item in wanted["files"]:
            mode = "lfs" if item["path"].endswith(LFS_SUFFIXES) else "regular"
            old = files.get(item["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if mode == "lfs" else git_oid(old)
            answer.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": answer})

    def lfs_batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.lfs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def lfs_file(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise _Refused(400, "the content has another hash than its name")
            self.hub.lfs[oid] = body
            return self.json({})
        self.send_file(self.hub.lfs[oid], {"ETag": f'"{oid}"'})

    def commit(self, repo_id: str, revision: str, body: bytes) -> None:
        repo = self.repo(repo_id, write=True)
        _, files = self.files(repo_id, revision)
        files = dict(files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise _Refused(400, "an LFS file of this commit was not uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, files)
        self.json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True})

    # -- reading ------------------------------------------------------------------------------------------------------

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "oid": git_oid(data), "size": len(data)}
        if name.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "sha256": oid, "size": len(data), "pointerSize": 134}
        return entry

    def info(self, repo_id: str, revision: str, blobs: bool) -> None:
        commit, files = self.files(repo_id, revision)
        siblings = []
        for name, data in files.items():
            sibling: dict[str, Any] = {"rfilename": name}
            if blobs:
                entry = self.entry(name, data)
                sibling |= {
                    "size": entry["size"],
                    "blobId": entry["oid"],
                    **({"lfs": entry["lfs"]} if "lfs" in entry else {}),
                }
            siblings.append(sibling)
        private = self.hub.repos[repo_id].private
        self.json({"id": repo_id, "modelId": repo_id, "sha": commit, "private": private, "siblings": siblings})

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        commit, files = self.files(repo_id, revision)
        if name not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        data = files[name]
        headers = {"X-Repo-Commit": commit}
        if not name.endswith(LFS_SUFFIXES):
            return self.send_file(data, {**headers, "ETag": f'"{git_oid(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.hub.lfs[oid] = data
        headers |= {
            "X-Linked-ETag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.cdn}/{oid}",
        }
        self.answer(302, b"", headers)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            data = data[start:]
        self.answer(status, data, headers)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        if self.fault == "corrupt" and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "break":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(data)
