"""A base's name: a path if it exists, else a hub id; anything else is one clear message."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError
from llmtune.models import hub
from llmtune.models.config import ModelConfig
from llmtune.models.resolve import resolve_base
from tests.quantized import store_quantized

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def editable(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "base"))


@pytest.fixture
def online(monkeypatch):
    """Let the hub client believe that there is a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def no_network(online, monkeypatch):
    """Refuse every name look-up; returns the names that were asked for."""
    asked = []

    def refuse(name, *args, **kwargs):
        asked.append(name)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


@pytest.fixture
def hub_cache(checkpoint, tmp_path, monkeypatch):
    """A hub cache that holds org/tiny at COMMIT, as `main`."""
    repo = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(checkpoint("llama"), repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo / "snapshots" / COMMIT


def test_existing_directory_is_taken_as_it_is(checkpoint):
    source = resolve_base(ModelConfig(base=str(checkpoint("llama"))))

    assert source.directory == checkpoint("llama")
    assert source.revision is None
    assert source.adapter_base == str(source.directory)


def test_relative_path_is_recorded_absolute(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint("llama").parent)

    assert resolve_base(ModelConfig(base="llama")).directory == checkpoint("llama")


def test_path_wins_over_hub_id_that_reads_the_same(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint("llama"), tmp_path / "org" / "tiny")
    monkeypatch.chdir(tmp_path)

    assert resolve_base(ModelConfig(base="org/tiny")).origin == str(tmp_path / "org" / "tiny")


def test_unreachable_hub_is_one_message_with_both_readings_at_once(no_network):
    with pytest.raises(LlmtuneError) as caught:
        resolve_base(ModelConfig(base="org/absent"))

    assert len(no_network) <= 2  # nothing is tried again and again, which would take seconds
    assert "no such local path" in str(caught.value)
    assert "hub could not be reached" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_that_never_answers_is_given_up_within_5_seconds(online, monkeypatch):
    assert hub.LOOKUP_SECONDS < 5
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(60))
    monkeypatch.setattr(hub, "LOOKUP_SECONDS", 0.3)
    start = time.perf_counter()
    with pytest.raises(LlmtuneError, match=r"could not be reached \(no answer within 0\.3 s"):
        resolve_base(ModelConfig(base="org/absent"))

    assert time.perf_counter() - start < 50  # far less, but for a machine that has other work


def test_cached_model_is_used_without_network_and_pinned_to_its_commit(no_network, hub_cache):
    source = resolve_base(ModelConfig(base="org/tiny"))

    assert source.directory == hub_cache
    assert source.revision == COMMIT
    assert source.adapter_base == "org/tiny"


def test_cached_commit_needs_no_look_up(monkeypatch, hub_cache):
    monkeypatch.setattr(hub, "_look_up_commit", lambda *args: pytest.fail("asked the hub"))

    assert resolve_base(ModelConfig(base="org/tiny", revision=COMMIT)).directory == hub_cache


def test_unfinished_download_is_not_taken_for_a_model(no_network, hub_cache):
    (hub_cache / "model.safetensors").unlink()
    with pytest.raises(LlmtuneError, match="hub could not be reached"):
        resolve_base(ModelConfig(base="org/tiny"))


def test_quantized_model_of_the_hub_is_its_dense_checkpoint_at_that_commit(
    hub_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    store_quantized(hub_cache, "gptq")
    source = resolve_base(ModelConfig(base="org/tiny", revision=COMMIT))

    assert source.directory.parent == tmp_path / "cache" / "bases"
    assert (source.adapter_base, source.revision) == ("org/tiny", COMMIT)
    assert source.as_record()["stored"].startswith("gptq 4-bit, dequantized")


def test_unknown_quantization_is_refused_before_the_weights_are_fetched(hub_cache, monkeypatch):
    config = json.loads((hub_cache / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "vptq"}
    (hub_cache / "config.json").write_text(json.dumps(config))
    (hub_cache / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "_look_up_commit", lambda *args: COMMIT)
    monkeypatch.setattr(hub, "_download", lambda *args, **more: pytest.fail("fetched"))

    with pytest.raises(LlmtuneError, match=r"model.base=org/tiny: .* by 'vptq', which is not"):
        resolve_base(ModelConfig(base="org/tiny"))


def test_offline_switch_is_obeyed_at_once(tmp_path):
    program = (
        "from llmtune.models.config import ModelConfig\n"
        "from llmtune.models.resolve import resolve_base\n"
        "try: resolve_base(ModelConfig(base='org/absent'))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "import sys; assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )

    assert result.stdout.startswith("LlmtuneError")
    assert "offline mode" in result.stdout


@pytest.mark.parametrize(
    "name", ["./no/such", "/no/such", "nothing", "models/absent.gguf", "a/b/c"]
)
def test_name_that_is_no_hub_id_is_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(hub, "_look_up_commit", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(LlmtuneError, match="no such local path"):
        resolve_base(ModelConfig(base=name))


def test_revision_of_a_local_path_is_refused(checkpoint):
    with pytest.raises(LlmtuneError, match="no revisions"):
        resolve_base(ModelConfig(base=str(checkpoint("llama")), revision="main"))


def test_remote_code_needs_a_pinned_revision():
    with pytest.raises(LlmtuneError, match="pin it"):
        resolve_base(ModelConfig(base="org/absent", trust_remote_code=True))


def test_adapter_given_as_base_is_recognized(editable):
    (editable / "config.json").rename(editable / "adapter_config.json")
    with pytest.raises(LlmtuneError, match="adapter.init_from"):
        resolve_base(ModelConfig(base=str(editable)))


def test_pickled_weights_are_refused_unless_asked_for(editable):
    (editable / "model.safetensors").rename(editable / "pytorch_model.bin")
    with pytest.raises(LlmtuneError, match="model.weights=any"):
        resolve_base(ModelConfig(base=str(editable)))

    assert resolve_base(ModelConfig(base=str(editable), weights="any")).directory == editable


def test_missing_shard_is_named(editable):
    (editable / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}
    (editable / "model.safetensors.index.json").write_text(json.dumps(index))
    (editable / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(LlmtuneError, match="gone.safetensors"):
        resolve_base(ModelConfig(base=str(editable)))


def test_base_that_is_quantized_in_an_unknown_way_is_refused_before_training(editable):
    config = json.loads((editable / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (editable / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmtuneError, match=r"'aqlm', which is not read .* give the 16-bit"):
        resolve_base(ModelConfig(base=str(editable)))


def test_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(LlmtuneError, match="not a .gguf file"):
        resolve_base(ModelConfig(base=str(tmp_path / "model.pt")))
