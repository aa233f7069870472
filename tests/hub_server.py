"""A small Hub on this machine, in memory: what huggingface_hub, transformers and datasets ask for when they push and load.

Large files take the way of LFS, to a storage of another host name that sees no token, as on the Hub. The server is also the
proxy of its clients, so a request to any other host arrives here: it is noted and refused.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin")
LFS_SIZE = 1_000_000


class HubError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message, **headers}


@dataclass(frozen=True)
class File:
    """A version of a file."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """Its name in the storage of LFS."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        """Its name, or that of the pointer to it, in git."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A commit with all files of its tree."""

    title: str
    files: dict[str, File]
    parent: "Commit | None" = None

    @cached_property
    def id(self) -> str:
        tree = sorted((path, file.etag) for path, file in self.files.items())
        return hashlib.sha1(repr((self.title, tree, self.parent and self.parent.id)).encode()).hexdigest()

    def history(self) -> "list[Commit]":
        """This commit and those before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]


class Repo:
    """A repository; as on the Hub, it starts with a commit of .gitattributes."""

    def __init__(self, private: bool = False, gated: bool = False) -> None:
        self.private, self.gated = private, gated
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.refs = {"refs/heads/main": Commit("initial commit", {".gitattributes": File(attributes.encode())})}

    def at(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or id."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        for commit in (commit for tip in self.refs.values() for commit in tip.history()):
            if commit.id == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Hub:
    """The server and what it holds; a context manager.

    A user writes in the namespace of their own name. A private repository is for its owner alone, and so are the files of a
    gated one.
    """

    def __init__(self) -> None:
        self.token = "hf_user"
        self.users = {self.token: "user", "hf_guest": "guest"}
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind, "model" or "dataset", and name
        self.storage: dict[str, bytes] = {}  # LFS objects by their sha256
        self.breaks: Counter[str] = Counter()  # connections to break in the middle of an "upload" or a "commit"
        self.requests: list[str] = []
        self.strangers: list[str] = []  # other hosts that clients wanted to ask
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}/storage"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], kind: str = "model", **settings: bool) -> Repo:
        """A repository with these small files, as if pushed before."""
        repo = self.repos[kind, name] = Repo(**settings)
        first = repo.at("main")
        added = {path: File(content) for path, content in files.items()}
        repo.refs["refs/heads/main"] = Commit("added", first.files | added, first)
        return repo

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return {path: file.content for path, file in self.repos[kind, name].at(revision).files.items()}

    def commits(self, name: str, kind: str = "model", revision: str = "main") -> list[str]:
        """Titles of the commits, newest first."""
        return [commit.title for commit in self.repos[kind, name].at(revision).history()]


def environment(hub: Hub, home: Path, token: str | None = "hf_user", **changes: str) -> dict[str, str]:
    """Environment of a client in a subprocess: online with this Hub alone, its cache in `home`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        ours |= {name: hub.url, name.upper(): hub.url}
    ours |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")
    ours |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return ours | ({"HF_TOKEN": token} if token else {}) | changes


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection. A route's method returns what is sent as JSON, or None if it has answered."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing: `Hub.requests` has them."""

    def _answer(self) -> None:
        target = urlsplit(self.path)
        if self.command == "CONNECT" or target.netloc:
            self.hub.strangers.append(target.hostname or self.path)
            self.close_connection = True
            return self._send(502)
        self.hub.requests.append(f"{self.command} {target.path}")
        self.query = {key: values[-1] for key, values in parse_qs(target.query).items()}
        try:
            self.body = self._read()
            answer, status, headers = self._routed(target.path), 200, {}
        except HubError as error:
            answer, status, headers = {"error": str(error)}, error.status, error.headers
        except ConnectionAbortedError:
            self.close_connection = True
            return None
        if answer is not None:
            self._send(status, json.dumps(answer).encode(), **headers)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = _answer

    def _read(self) -> bytes:
        stage = "upload" if self.command == "PUT" else "commit" if "/commit/" in self.path else ""
        size = int(self.headers.get("Content-Length", 0))
        with self.hub.lock:
            broken = self.hub.breaks[stage] > 0
            self.hub.breaks[stage] -= broken
        if broken:
            self.rfile.read(size // 2)
            raise ConnectionAbortedError
        return self.rfile.read(size)

    def _routed(self, path: str) -> Any:
        authorization = self.headers.get("Authorization")
        self.user = self.hub.users.get(authorization.removeprefix("Bearer ")) if authorization else None
        if authorization and self.user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        for route, method in ROUTES.items():
            if match := re.fullmatch(route, f"{self.command.replace('HEAD', 'GET')} {path}"):
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                if "name" in parts:
                    self._find_repo("dataset" if "dataset" in parts.pop("kind", "") else "model", parts.pop("name"))
                with self.hub.lock if self.body else nullcontext():  # a download may wait for its client
                    return method(self, **parts)
        raise HubError(404, f"This Hub does not answer {self.command} {path}")

    def _find_repo(self, kind: str, name: str) -> None:
        """Set `repo` and its `page` if the user may know of it and, if that is what they ask for, write to it."""
        repo = self.hub.repos.get((kind, name))
        self.is_owner = self.user == name.split("/")[0]
        if repo is None or (repo.private and not self.is_owner):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if self.command == "POST" and not self.is_owner:
            raise HubError(403, f"You have no right to write to {name}")
        self.repo, self.name, self.page = repo, name, f"{self.hub.url}/{'datasets/' * (kind == 'dataset')}{name}"

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_file(self, content: bytes, **headers: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._send(200, content, **headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        span = f"{start}-{stop - 1}" if start < stop else "*"
        headers["Content-Range"] = f"bytes {span}/{len(content)}"
        return self._send(206 if start < stop else 416, content[start:stop], **headers)

    def whoami(self) -> dict[str, Any]:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self) -> dict[str, Any]:
        metadata = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            yaml.safe_load(metadata[1] if metadata else "")
        except yaml.YAMLError as error:
            raise HubError(400, f"Invalid YAML: {error}".replace("\n", " ")) from error
        return {"errors": [], "warnings": [] if metadata else [{"message": "empty or missing yaml metadata in card"}]}

    def create_repo(self) -> dict[str, Any] | None:
        asked = json.loads(self.body)
        kind, owner = asked.get("type", "model"), asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        if self.user is None or owner != self.user:
            raise HubError(403 if self.user else 401, f"You have no right to create {name}")
        answer = {"url": f"{self.hub.url}/{'datasets/' * (kind == 'dataset')}{name}", "name": name}
        if (kind, name) in self.hub.repos:
            self._send(409, json.dumps(answer).encode())
            return None
        self.hub.repos[kind, name] = Repo(private=asked.get("visibility") == "private")
        return answer

    def info(self, revision: str = "main") -> dict[str, Any]:
        commit = self.repo.at(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        gated = "auto" if self.repo.gated else False
        return {"id": self.name, "sha": commit.id, "private": self.repo.private, "gated": gated, "siblings": siblings}

    def tree(self, revision: str, path: str = "") -> list[dict[str, Any]]:
        prefix, recursive = f"{path}/" if path else "", self.query.get("recursive", "").lower() == "true"
        entries = {}
        for name, file in sorted(self.repo.at(revision).files.items()):
            if not name.startswith(prefix):
                continue
            entries[name] = {"type": "file", "path": name, "oid": file.oid, "size": len(file.content)}
            if file.lfs:
                entries[name]["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
            for folder in map(str, Path(name).parents):
                if folder.startswith(prefix) and folder != ".":
                    entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return [entry for name, entry in entries.items() if recursive or "/" not in name.removeprefix(prefix)]

    def refs(self) -> dict[str, list[dict[str, str]]]:
        def listed(prefix: str) -> list[dict[str, str]]:
            found = [(ref, commit.id) for ref, commit in self.repo.refs.items() if ref.startswith(prefix)]
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit} for ref, commit in found]

        return {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}

    def create_branch(self, branch: str) -> dict[str, Any]:
        return self._new_ref(f"refs/heads/{branch}", json.loads(self.body).get("startingPoint", "main"))

    def create_tag(self, revision: str) -> dict[str, Any]:
        return self._new_ref(f"refs/tags/{json.loads(self.body)['tag']}", revision)

    def _new_ref(self, ref: str, revision: str) -> dict[str, Any]:
        if ref in self.repo.refs:
            raise HubError(409, f"{ref} already exists")
        self.repo.refs[ref] = self.repo.at(revision)
        return {}

    def preupload(self, revision: str) -> dict[str, Any]:
        present, modes = self.repo.at(revision).files, []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or asked["size"] > LFS_SIZE else "regular"
            oid = present[path].etag if path in present else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": modes}

    def lfs_batch(self) -> dict[str, Any]:
        objects = json.loads(self.body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.hub.storage:
                verify = {"href": f"{self.page}.git/info/lfs/objects/verify"}
                asked["actions"] = {"upload": {"href": f"{self.hub.storage_url}/{asked['oid']}"}, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self) -> dict[str, Any]:
        asked = json.loads(self.body)
        if len(self.hub.storage.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, f"{asked['oid']} was not uploaded")
        return {}

    def store(self, oid: str) -> dict[str, Any]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content is not what its name says")
        self.hub.storage[oid] = self.body
        return {}

    def stored(self, oid: str) -> None:
        if oid not in self.hub.storage:
            raise HubError(404, f"{oid} was not uploaded")
        self._send_file(self.hub.storage[oid], ETag=f'"{oid}"')

    def commit(self, revision: str) -> dict[str, Any]:
        """All operations of the commit or, if one of them fails, none."""
        parent = self.repo.at(revision)
        header, *operations = map(json.loads, self.body.splitlines())
        files = dict(parent.files)
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise HubError(400, f"The LFS object of {path} was not uploaded")
                files[path] = File(self.hub.storage[value["oid"]], lfs=True)
            else:  # deletedFile or deletedFolder
                gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {name: file for name, file in files.items() if name not in gone}
        commit = Commit(header["value"]["summary"], files, parent)
        answer = {"success": True, "commitOid": commit.id, "commitUrl": f"{self.page}/commit/{commit.id}"}
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in self.repo.refs)
            ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.page}/discussions/{number}"
        self.repo.refs[ref] = commit
        return answer

    def resolve(self, revision: str, path: str) -> None:
        if self.repo.gated and not self.is_owner:
            raise HubError(403 if self.user else 401, f"Access to {self.name} is restricted.", "GatedRepo")
        commit = self.repo.at(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        file = commit.files[path]
        if not file.lfs:
            return self._send_file(file.content, ETag=f'"{file.etag}"', **headers)
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        return self._send(302, b"", Location=f"{self.hub.storage_url}/{file.sha256}", **headers)


API = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"
ROUTES: dict[str, Callable[..., Any]] = {
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/validate-yaml": _Handler.validate_yaml,
    "POST /api/repos/create": _Handler.create_repo,
    f"GET {API}(?:/revision{REVISION})?": _Handler.info,
    f"GET {API}/tree{REVISION}(?:/(?P<path>.+))?": _Handler.tree,
    f"GET {API}/refs": _Handler.refs,
    f"POST {API}/branch/(?P<branch>[^/]+)": _Handler.create_branch,
    f"POST {API}/tag{REVISION}": _Handler.create_tag,
    f"POST {API}/preupload{REVISION}": _Handler.preupload,
    f"POST {API}/commit{REVISION}": _Handler.commit,
    rf"POST {PAGE}\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    rf"POST {PAGE}\.git/info/lfs/objects/verify": _Handler.lfs_verify,
    f"GET {PAGE}/resolve{REVISION}/(?P<path>.+)": _Handler.resolve,
    r"PUT /storage/(?P<oid>\w+)": _Handler.store,
    r"GET /storage/(?P<oid>\w+)": _Handler.stored,
}
