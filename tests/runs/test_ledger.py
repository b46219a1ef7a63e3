"""The ledger: what is finished is skipped, what changed is refused, one process holds a run."""

import multiprocessing

import pytest

from llmtune.errors import LlmtuneError
from llmtune.io.manifest import read_manifest
from llmtune.io.run_dir import RunDir
from llmtune.runs.ledger import open_ledger

CONFIG = {"train": {"steps": 3}, "evaluate": {"limit": 1}}


def opened(run, config=CONFIG, **options):
    return open_ledger(run, config, deciding=lambda values: {"train": values["train"]}, **options)


def do(ledger, name, inputs, work):
    """Do a stage as `Stage.do` does."""
    result = ledger.finished(name, inputs)
    if result is None:
        ledger.begin(name, inputs)
        result = work()
        ledger.finish(name, result)
    return result


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def test_a_finished_stage_is_skipped_until_its_inputs_change(run):
    calls = []
    for inputs in ({"rows": 1}, {"rows": 1}, {"rows": 2}):
        with opened(run) as ledger:
            result = do(ledger, "train", inputs, lambda: calls.append(1) or {"n": len(calls)})
    assert len(calls) == 2
    assert result == {"n": 2}


def test_a_stage_that_fails_stays_unfinished_and_is_done_again(run):
    def fail():
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError), opened(run) as ledger:
        do(ledger, "train", {}, fail)
    assert "finished" not in read_manifest(run).stages["train"]
    with opened(run) as ledger:
        assert do(ledger, "train", {}, lambda: {"n": 1}) == {"n": 1}


def test_redoing_a_stage_undoes_the_stages_after_it(run):
    with opened(run) as ledger:
        for stage in ("train", "merge", "evaluate"):
            do(ledger, stage, {}, dict)
        do(ledger, "train", {"new": True}, dict)
    assert set(read_manifest(run).stages) == {"train"}


def test_another_config_is_refused_by_key_once_there_is_an_adapter(run):
    with opened(run):
        run.adapter_dir.mkdir()
    changed = {**CONFIG, "train": {"steps": 4}}
    with pytest.raises(LlmtuneError, match=r"train\.steps: was 3, is 4"), opened(run, changed):
        pass
    assert read_manifest(run).config == CONFIG


def test_another_config_is_fine_while_nothing_was_trained(run):
    with opened(run):
        pass
    with opened(run, {**CONFIG, "train": {"steps": 4}}):
        pass
    assert read_manifest(run).config["train"] == {"steps": 4}


def test_a_section_that_does_not_decide_the_adapter_may_change(run):
    with opened(run):
        run.adapter_dir.mkdir()
    with opened(run, {**CONFIG, "evaluate": {"limit": 9}}):
        pass
    assert read_manifest(run).config["evaluate"] == {"limit": 9}


def test_force_removes_what_was_there(run):
    with opened(run) as ledger:
        do(ledger, "train", {}, dict)
        run.adapter_dir.mkdir()
    with opened(run, {**CONFIG, "train": {"steps": 4}}, force=True) as ledger:
        assert not run.adapter_dir.exists()
        assert ledger.manifest.stages == {}


def test_a_directory_that_is_not_a_run_is_left_alone(run):
    run.path.mkdir()
    (run.path / "thesis.tex").write_text("precious")
    with pytest.raises(LlmtuneError, match=r"thesis\.tex.*not a run"), opened(run, force=True):
        pass
    assert (run.path / "thesis.tex").read_text() == "precious"


def test_a_damaged_manifest_says_what_to_do(run):
    with opened(run):
        pass
    run.manifest_path.write_text("{")
    with pytest.raises(LlmtuneError, match="--force"), opened(run):
        pass


def _hold(path, is_held, may_end):
    with opened(RunDir(path)):
        is_held.set()
        may_end.wait(300)


def test_two_processes_do_not_work_in_one_run(run):
    context = multiprocessing.get_context("spawn")
    is_held, may_end = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(run.path, is_held, may_end))
    holder.start()
    try:
        assert is_held.wait(300)
        with pytest.raises(LlmtuneError, match="another llmtune process"), opened(run):
            pass
    finally:
        may_end.set()
        holder.join(300)
