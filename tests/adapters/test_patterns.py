"""A pattern of an adapter's config that would hang is refused; those in use are not."""

import json
import time

import pytest

from llmtune import cli
from llmtune.adapters import patterns
from llmtune.adapters.patterns import require_quick_patterns
from llmtune.errors import LlmtuneError
from tests.damages import CATASTROPHIC
from tests.merging.adapters import make_adapter, make_base

IN_USE = [
    "q_proj",
    r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
    r".*\.(q_proj|v_proj)",
    r"^(?!.*vision).*\.layers\.[0-9]+\..*(q_proj|gate_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:k_proj|v_proj|q_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj)))",
]


def test_patterns_in_use_are_quick():
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(200)]
    require_quick_patterns(IN_USE, names, place="a")


@pytest.mark.parametrize(
    "pattern", [CATASTROPHIC, "(a|a)*(a|a)*!", r"(\w+\s?)*\$", "(" * 50, "a[9"]
)
def test_a_pattern_that_hangs_or_is_none_is_one_error(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "MOST_SECONDS", 1)
    with pytest.raises(LlmtuneError, match="a: the pattern .*(takes too long|is not a regex)"):
        require_quick_patterns([pattern], ["a" * 40], place="a")


def test_merge_refuses_an_adapter_whose_pattern_hangs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(patterns, "MOST_SECONDS", 1)
    base, adapter = make_base(tmp_path / "base"), tmp_path / "adapter"
    make_adapter(base, adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {CATASTROPHIC: 4}}))
    began = time.monotonic()
    assert cli.run_command(["merge", str(adapter), "--out", str(tmp_path / "out")]) == 2
    assert "adapter_config.json: the pattern" in capsys.readouterr().err
    assert time.monotonic() - began < 20
