"""The `protect` section in a run: what it reads, writes, logs, and refuses."""

import json

import pytest

from llmtune import load_config
from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir
from llmtune.runs import pipeline
from llmtune.runs.evaluate import trained_steps
from tests.conftest import write_jsonl
from tests.project import make_project

EVERYTHING = {
    "replay": {"source": "self", "share": 0.1},
    "kl_to_base": {"weight": 0.5, "source": "self", "rows": 2, "max_length": 24},
    "l2": 0.01,
}


def read_metrics(config):
    return [json.loads(line) for line in config.run.metrics_path.read_text().splitlines()]


def test_the_bases_own_text_is_replayed_held_to_and_kept(tmp_path, monkeypatch):
    path = make_project(tmp_path, protect=EVERYTHING)
    config = load_config(path, ["train.num_epochs=1", "train.max_steps=null"])
    result = pipeline.train(config)
    assert result["protect"] == {"replayed_rows": 6, "rows_held_to_base": 64}
    trained = trained_steps(config)
    assert (trained.num_sources, trained.num_added, trained.num_epochs(48)) == (1, 6, 1)
    written = json.loads(config.run.own_text_path.read_text())
    assert {name: len(texts) for name, texts in written.items()} == {"replay": 6, "kl_to_base": 64}
    losses = [line for line in read_metrics(config) if "loss" in line]
    assert losses[0]["kl_to_base"] == pytest.approx(0, abs=1e-6)
    assert losses[-1]["kl_to_base"] > 0 and losses[-1]["update_norm"] > 0
    assert any("loss/the base's own text" in line for line in losses)
    # The same call again finds the stage finished; another protection is another run.
    assert pipeline.train(config)["seconds"] == result["seconds"]
    with pytest.raises(LlmtuneError):
        pipeline.train(load_config(path, ["protect.l2=0.5"]))
    # A later run on the same base takes the text over and learns the same.
    with monkeypatch.context() as patch:
        patch.delattr("llmtune.training.protect.prepare.write_own_text")
        overrides = ["train.num_epochs=1", "train.max_steps=null", f"run_dir={tmp_path / 'later'}"]
        later = load_config(path, overrides)
        pipeline.train(later)
    assert json.loads(later.run.own_text_path.read_text()) == written
    assert [line.get("loss") for line in read_metrics(later)] == [
        line.get("loss") for line in read_metrics(config)
    ]
    for kept in (cache_dir() / "own_text").iterdir():  # a damaged file is not used
        kept.write_text(kept.read_text().replace("[", "[1,", 1))
    with monkeypatch.context() as patch:
        patch.delattr("llmtune.training.protect.prepare.write_own_text")
        with pytest.raises(NameError):
            pipeline.train(load_config(path, [*overrides[:2], f"run_dir={tmp_path / 'damaged'}"]))


def test_files_can_be_replayed_and_held_to(tmp_path):
    texts = [{"text": f"The quick brown fox saw {n} dogs."} for n in range(41)]
    prose = write_jsonl(tmp_path / "prose.jsonl", texts[:40])
    protect = {
        "replay": {"source": {"path": str(prose), "format": "text"}, "share": 0.2},
        "kl_to_base": {"source": {"path": str(prose), "format": "text"}, "max_length": 8},
    }
    config = load_config(make_project(tmp_path / "project", protect=protect))
    result = pipeline.train(config)
    assert result["protect"] == {"replayed_rows": 0, "rows_held_to_base": 40}
    assert any("loss/" + str(prose) in line for line in map(json.dumps, read_metrics(config)))
    assert not config.run.own_text_path.exists()

    write_jsonl(prose, texts)
    with pytest.raises(LlmtuneError, match="trained on a different data"):
        pipeline.train(config)


def test_a_run_without_protection_records_none(tmp_path):
    result = pipeline.train(load_config(make_project(tmp_path)))
    assert result["protect"] is None


def test_a_run_refused_after_the_base_wrote_its_text_leaves_nothing(tmp_path):
    path = make_project(tmp_path, protect={"kl_to_base": EVERYTHING["kl_to_base"]})
    config = load_config(path, ["adapter.modules_to_save=[lm_head]"])
    with pytest.raises(LlmtuneError, match="frozen linear LM head"):
        pipeline.train(config)
    assert not config.run.path.exists()
    assert pipeline.train(load_config(path))["steps"] == 3


def test_what_is_redone_keeps_no_page_and_no_text_of_before(tmp_path):
    path = make_project(tmp_path, protect={"replay": EVERYTHING["replay"]})
    config = load_config(path)
    pipeline.train(config)
    pipeline.report(config.run_dir)
    pipeline.train(load_config(path, ["protect.replay=null"]), force=True)
    left = {each.name for each in config.run.path.iterdir()}
    assert left == {".lock", "adapter", "checkpoints", "manifest.json", "metrics.jsonl"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("protect.kl_to_base={weight: 0}", "greater than 0"),
        ("protect.replay={source: self, share: 1}", "less than 1"),
        ("protect.kl_to_bse={}", "kl_to_base"),
        ("protect.replay={source: nowhere.txt}", "nowhere.txt"),
    ],
)
def test_bad_protection_is_named(tmp_path, override, expected):
    with pytest.raises(LlmtuneError, match=expected):
        pipeline.train(load_config(make_project(tmp_path), [override]))
