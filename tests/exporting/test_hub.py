"""A push goes to a private repository with the environment's token, or is refused in words."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest

from llmtune.errors import LlmtuneError
from llmtune.exporting.hub import push_directory

TOKEN = "hf_secret_of_the_test"


class Hub(ThreadingHTTPServer):
    """The repositories of a model hub, in memory."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, Any] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False


class StandIn(BaseHTTPRequestHandler):
    """As much of a model hub as a push needs."""

    server: Hub

    def do_GET(self):
        repo = self.path.removeprefix("/api/models/")
        if repo not in self.server.private:
            return self._reply({"error": "Repository not found"}, status=404)
        return self._reply({"id": repo, "private": self.server.private[repo]})

    def do_PUT(self):
        self.server.blobs[self.path] = self._body()
        self._reply({})

    def do_POST(self):
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            return self._reply({"error": "no write access"}, status=403)
        body = self._body()
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            return self._preupload(json.loads(body))
        if self.path.endswith("/objects/batch"):
            return self._batch(json.loads(body))
        assert "/commit/" in self.path, self.path
        for line in body.decode().splitlines():
            operation = json.loads(line)
            if operation["key"] in {"file", "lfsFile"}:
                self.server.files[operation["value"]["path"]] = operation["value"]
        return self._reply(
            {"commitOid": "c" * 40, "commitUrl": self._commit_url(), "success": True}
        )

    def _commit_url(self):
        return f"{self.server.url}/{next(iter(self.server.private))}/commit/{'c' * 40}"

    def _create(self, body):
        repo = f"{body['organization']}/{body['name']}"
        if repo in self.server.private:
            return self._reply({"error": "exists", "url": f"{self.server.url}/{repo}"}, status=409)
        self.server.private[repo] = body.get("private", body.get("visibility") == "private")
        return self._reply({"url": f"{self.server.url}/{repo}"})

    def _preupload(self, body):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in body["files"]
        ]
        self._reply({"files": modes})

    def _batch(self, body):
        objects = [
            {
                **one,
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.server.url}/blob/{one['oid']}"}},
            }
            for one in body["objects"]
        ]
        self._reply({"transfer": "basic", "objects": objects})

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def model_dir(tmp_path):
    directory = tmp_path / ".cache" / "model"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "llmtune_merge.json").write_text('{"base": "/home/someone"}')
    (directory / ".hidden").write_text("x")
    return directory


def test_a_push_is_private_and_holds_the_models_files_and_the_card(hub, model_dir):
    result = push_directory(model_dir, "org/tiny", card="# tiny\n", public=False)
    assert hub.private == {"org/tiny": True}
    assert result.is_private
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md"}
    assert base64.b64decode(hub.files["README.md"]["content"]) == b"# tiny\n"
    assert list(hub.blobs.values()) == [b"weights"]
    assert set(result.files) == set(hub.files)
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_a_directorys_own_card_is_kept(hub, model_dir):
    (model_dir / "README.md").write_text("mine")
    push_directory(model_dir, "org/tiny", card="# tiny\n", public=False)
    assert base64.b64decode(hub.files["README.md"]["content"]) == b"mine"


@pytest.mark.parametrize(
    ("base", "pushed"),
    [
        ({"origin": "/home/me/llama-1b"}, "llama-1b"),
        ({"origin": "org/llama", "revision": "4f"}, "org/llama"),
    ],
)
def test_an_adapter_is_pushed_without_the_path_of_its_base(base, pushed, hub, model_dir):
    place = {"base_model_name_or_path": "/home/me/.cache/llmtune/bases/0a", "r": 4}
    (model_dir / "adapter_config.json").write_text(json.dumps(place))
    manifest = {"format": 1, "base": base, "files": {}}
    (model_dir / "llmtune_adapter.json").write_text(json.dumps(manifest))
    push_directory(model_dir, "org/tiny", card="", public=False)
    config = json.loads(base64.b64decode(hub.files["adapter_config.json"]["content"]))
    assert config == {"base_model_name_or_path": pushed, "r": 4}


def test_public_is_only_on_request(hub, model_dir):
    push_directory(model_dir, "org/open", card="", public=True)
    assert hub.private == {"org/open": False}
    hub.files.clear()
    with pytest.raises(LlmtuneError, match="exists and is public"):
        push_directory(model_dir, "org/open", card="", public=False)
    assert hub.files == {}


def test_a_refusal_names_the_repository_and_never_the_token(hub, model_dir):
    hub.refuses = True
    with pytest.raises(LlmtuneError, match="org/tiny: the hub refused") as caught:
        push_directory(model_dir, "org/tiny", card="", public=False)
    assert TOKEN not in str(caught.value)


def test_the_token_comes_from_the_environment_only(hub, model_dir, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LlmtuneError, match="environment variable HF_TOKEN"):
        push_directory(model_dir, "org/tiny", card="", public=False)
    assert hub.private == {}


@pytest.mark.parametrize("repo", [None, "tiny", "a/b/c"])
def test_a_repository_is_org_and_name(repo, hub, model_dir):
    with pytest.raises(LlmtuneError, match="expected org/name"):
        push_directory(model_dir, repo, card="", public=False)


def test_a_hub_that_is_not_there_is_an_error(model_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(LlmtuneError, match="could not be reached"):
        push_directory(model_dir, "org/tiny", card="", public=False)
