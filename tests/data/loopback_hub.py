"""A stand-in for the hub on this machine: the endpoints that reading a data set asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


class LoopbackHub:
    """Data sets by name, each a mapping of revision to commit, and of commit to files."""

    def __init__(self) -> None:
        self.revisions: dict[str, dict[str, str]] = {}
        self.commits: dict[tuple[str, str], Files] = {}
        self.requests: list[str] = []

    def add(self, name: str, revision: str, files: Files) -> str:
        """Add a commit under a branch or tag; return its hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.revisions.setdefault(name, {})[revision] = commit
        self.revisions[name][commit] = commit
        self.commits[name, commit] = files
        return commit

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Answer on a free port of this machine; yields the address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
                self._api("/".join(parts[2:4]), parts[4:])
            elif parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
                self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
            else:
                self._missing("EntryNotFound")

        def _api(self, name: str, rest: list[str]) -> None:
            if name not in hub.revisions:
                return self._missing("RepoNotFound")
            revision = rest[1] if len(rest) > 1 else "main"
            commit = hub.revisions[name].get(revision)
            if commit is None:
                return self._missing("RevisionNotFound")
            files = hub.commits[name, commit]
            if not rest or rest[0] == "revision":
                siblings = [{"rfilename": path} for path in files]
                return self._json({"id": name, "sha": commit, "siblings": siblings, "tags": []})
            entries: list[dict[str, Any]] = [
                {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                for path, content in files.items()
            ]
            folders = {path.rsplit("/", 1)[0] for path in files if "/" in path}
            entries += [{"type": "directory", "path": f, "size": 0, "oid": ""} for f in folders]
            if rest[0] == "paths-info":
                asked = json.loads(self._body)["paths"]
                return self._json([entry for entry in entries if entry["path"] in asked])
            folder = "/".join(rest[2:])
            inside = [e for e in entries if not folder or e["path"].startswith(f"{folder}/")]
            if folder and not inside:
                return self._missing("EntryNotFound")
            return self._json(inside)

        def _file(self, name: str, revision: str, path: str) -> None:
            commit = hub.revisions.get(name, {}).get(revision)
            content = hub.commits.get((name, commit or ""), {}).get(path)
            if content is None:
                return self._missing("EntryNotFound")
            start, stop = 0, len(content)
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes="):
                low, _, high = asked[6:].partition("-")
                start, stop = int(low), min(int(high) + 1 if high else stop, stop)
            headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit or ""}
            if asked:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self._answer(206 if asked else 200, content[start:stop], headers)

        def _json(self, value: object) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _missing(self, code: str) -> None:
            self._answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
