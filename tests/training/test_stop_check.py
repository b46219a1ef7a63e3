"""A model that learned to stop stops by itself, and one that did not is found right away."""

import json
import logging
from dataclasses import replace
from typing import Any

import pytest

from llmtune import load_config, train
from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.io.manifest import read_manifest
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.turns import stop_token_ids
from llmtune.reporting.verdict.caveats import find_training_caveats
from llmtune.training.adapt import MAX_NEW_TOKENS, StopCheck, check_stops
from llmtune.training.metrics import is_falling
from llmtune.training.train import train_adapter
from tests.conftest import write_jsonl
from tests.project import chat_row, make_project
from tests.training.tiny_runs import make_adapter, make_config, make_request, shared_tokenizer

OVERFIT = ["train.max_steps=200", "train.learning_rate=1e-2", "train.batch_size=1"]


def make_example() -> Example:
    tokenizer = shared_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The film is warm. positive or negative?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    answer = tokenizer("positive, and seven more words follow<|im_end|>")["input_ids"]
    return Example(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, "rows.jsonl", 1)


def overfit(example: Example, run) -> StopCheck:
    model = make_adapter()
    request = make_request(model, run, train=[example])
    train_adapter(make_config(max_steps=200, batch_size=1, learning_rate=1e-2), request)
    tokenizer = shared_tokenizer()
    result = check_stops(model, tokenizer, [make_example()], stop_token_ids(tokenizer))
    assert result is not None
    return result


def test_one_row_learned_by_heart_ends_by_itself(tmp_path, caplog):
    caplog.set_level(logging.INFO, "llmtune")
    result = overfit(make_example(), tmp_path)
    assert result == {"stopped": 1, "asked": 1, "max_new_tokens": result["max_new_tokens"]}
    assert result["max_new_tokens"] < MAX_NEW_TOKENS
    assert "1 of 1 answers ended by themselves" in caplog.text


def test_without_its_terminator_in_the_loss_the_same_row_never_ends(tmp_path, caplog):
    example = make_example()
    untrained = replace(example, labels=[*example.labels[:-1], IGNORE_INDEX])
    result = overfit(untrained, tmp_path)
    assert (result["stopped"], result["asked"]) == (0, 1)
    assert [record.levelname for record in caplog.records if "stop check" in record.message] == [
        "WARNING"
    ]


def test_a_run_records_whether_its_model_stops(tmp_path):
    path = make_project(tmp_path)
    config = load_config(path, [*OVERFIT, f"data.train=[{{path: {tmp_path}/one.jsonl}}]"])
    write_jsonl(tmp_path / "one.jsonl", [chat_row("The film is warm.", "positive")])
    write_jsonl(tmp_path / "validation.jsonl", [chat_row("The film is  warm!", "positive")])
    result: Any = train(config)
    assert (result["stop_check"]["stopped"], result["stop_check"]["asked"]) == (1, 1)
    recorded = read_manifest(config.run).stages["train"]["result"]["stop_check"]
    assert recorded == result["stop_check"]


def test_plain_text_has_no_prompt_to_ask(tmp_path):
    example = Example([5, 6, 7, 3], [5, 6, 7, 3], "f", 1)
    assert check_stops(make_adapter(), shared_tokenizer(), [example], (3,)) is None


def test_no_prompt_is_asked_that_leaves_no_room_for_an_answer():
    long = Example([9] * 500 + [8, 3], [IGNORE_INDEX] * 500 + [8, 3], "f", 1)  # 512 positions
    short = Example([9, 8, 3], [IGNORE_INDEX, 8, 3], "f", 2)
    result = check_stops(make_adapter(), shared_tokenizer(), [long, short], (3,))
    assert result["asked"] == 1


@pytest.mark.parametrize(("stopped", "is_said"), [(0, True), (3, True), (4, False), (8, False)])
def test_the_report_says_where_most_answers_did_not_end(stopped, is_said):
    check = {"stopped": stopped, "asked": 8, "max_new_tokens": 40}
    caveats = find_training_caveats({"stop_check": check})
    assert bool(caveats) is is_said
    if is_said:
        assert f"only {stopped} of 8 answers" in caveats[0]
    assert find_training_caveats({}) == find_training_caveats({"stop_check": None}) == ()


def test_the_report_says_if_only_a_part_of_the_rows_was_seen(tmp_path):
    config = load_config(make_project(tmp_path), ["train.max_steps=1"])
    result: Any = train(config)
    assert result["rows"] == {"rows": 48, "seen": 8, "is_loss_falling": False}
    (caveat,) = find_training_caveats({"rows": result["rows"]})
    assert "Only 8 of 48 training rows (16.7 %) were seen: more steps" in caveat
    falling = {"rows": {"rows": 48, "seen": 8, "is_loss_falling": True}}
    assert "still falling" in find_training_caveats(falling)[0]
    assert find_training_caveats({**falling, "stopped_by": "early_stopping"}) == ()
    assert find_training_caveats({"rows": {"rows": 48, "seen": 48, "is_loss_falling": True}}) == ()
    assert is_falling([4.0] * 8 + [3.0] * 4 + [2.0] * 4) and not is_falling([2.0, 1.99] * 8)


def test_every_stop_token_is_written_into_everything_that_is_saved(tmp_path):
    """A base whose end of text is not its template's end of turn, as base models often have."""
    path = make_project(tmp_path)
    base = tmp_path / "base"
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|unk|>"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = json.loads((base / "generation_config.json").read_text())
    generation["eos_token_id"] = 7
    (base / "generation_config.json").write_text(json.dumps(generation))

    from llmtune import merge
    from llmtune.adapters.manifest import read_adapter_manifest
    from llmtune.exporting.gguf_writer.vocabulary import read_vocabulary

    config = load_config(path, ["train.max_steps=2"])
    train(config)
    merge(config)
    stops = [1, 3, 7]
    assert read_adapter_manifest(config.run.adapter_dir)["stop_token_ids"] == stops
    for directory in (config.run.adapter_dir, config.run.merged_dir):
        saved = json.loads((directory / "generation_config.json").read_text())
        assert saved["eos_token_id"] == stops
    special = read_vocabulary(Checkpoint.open(config.run.merged_dir)).special_ids
    assert {special[name] for name in ("eos", "eot", "eom")} == set(stops)
