"""A sharded base is scored by the first process; no process holds two, and none goes on alone."""

import weakref

import pytest
import torch

from llmtune.errors import ProcessLost
from llmtune.evaluation.lending import Borrowing, lend_parts
from llmtune.evaluation.session import count_part
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.hardware import release_memory
from llmtune.models.probing import is_out_of_memory
from llmtune.scoring.live import load_live
from llmtune.training import sharding
from tests.processes import call_in_processes
from tests.tiny import make_model


class Loading:
    """Loads parts of a base, and knows how many of them were still held then."""

    def __init__(self, source, processes):
        self.source, self.processes = source, processes
        self.loaded, self.held = [], []

    def __call__(self, arm):
        self.held.append(self.still_held())
        config = ModelConfig.model_validate(
            {"base": str(self.source.directory), "dtype": "float32", "device": "cpu"}
        )
        live = load_live(config, self.source, None, cut=self.cut)
        self.loaded.append(weakref.ref(live.model))
        return live

    def cut(self, live, base):
        sharding.shard_base(live.model, live.device, self.processes, base)

    def still_held(self):
        return sum(model() is not None for model in self.loaded)


@pytest.fixture
def source(tmp_path):
    make_model("llama", tmp_path / "base")
    return Checkpoint.open(tmp_path / "base")


def test_a_part_is_given_back_before_the_next_one_is_loaded(source, tmp_path):
    def score(processes):
        load = Loading(source, processes)
        with processes.connected("cpu"):
            if not processes.is_first:
                lend_parts(processes, load)
                return load.held
            borrowing = Borrowing(processes, load)
            live = borrowing.load("tuned")
            del live
            release_memory()
            asked = load.still_held()
            borrowing.load("merged")
            borrowing.end()
        return asked, load.held

    assert call_in_processes(tmp_path, 2, score) == [(0, [0, 0]), [0, 0]]


def test_a_part_that_does_not_fit_ends_all_processes(source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def score(processes):
        load = Loading(source, processes)
        with pytest.raises(ProcessLost) as ended, processes.connected("cpu"):
            if not processes.is_first:
                lend_parts(processes, load)
            with monkeypatch.context() as patch:
                patch.setattr(sharding, "fully_shard", fail)
                Borrowing(processes, load).load("merged")
        lost = ended.value
        if processes.is_first:
            cause = lost.__cause__
            assert cause and not is_out_of_memory(cause), "nobody takes it for one arm's failure"
            processes.report_failure(str(lost), lost.exit_code)
        return str(lost), lost.exit_code

    first, second = call_in_processes(tmp_path, 2, score)
    assert first == second and first[1] == 2
    assert "the base does not fit into the memory of cpu" in first[0]


def test_a_part_of_a_base_has_all_of_its_embeddings(source):
    sizes = {name: weight.numel() for name, weight in make_model("llama").state_dict().items()}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    assert count_part(source, 4) == sum(sizes.values()) - layers + layers // 4
