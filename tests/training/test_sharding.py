"""A base that is cut over two processes trains what one process trains."""

import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from llmtune.config import load_config
from llmtune.errors import LlmtuneError
from llmtune.io.processes import ALONE
from llmtune.io.stopping import Interruption
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.load import load_model
from llmtune.scoring.live import load_live
from llmtune.training.reduction import Reduction, Stopping
from llmtune.training.rows import name_sources
from llmtune.training.setup import add_protection, set_up
from llmtune.training.sharding import shard_base
from llmtune.training.step import TrainingStep
from tests.processes import call_in_processes
from tests.tiny import make_model
from tests.training.fused.test_sharing import make_shared_rows
from tests.training.test_processes import make_weighted_rows, shaken
from tests.training.tiny_runs import (
    add_lora,
    largest_difference,
    make_adapter,
    make_config,
    make_request,
)

STEPS: dict[str, tuple[dict, dict, dict, range]] = {
    # name -> (the model, knobs of the training, changes of the request, rows of the step)
    "packed": ({}, {}, {}, range(8)),
    "more micro-batches in one process": (
        {},
        {"micro_batch_size": 1},
        {"packing": "off"},
        range(7),
    ),
    "a process without rows": ({}, {}, {}, range(1)),
    "recomputed, biases": (
        {"family": "qwen2"},
        {"gradient_checkpointing": True, "micro_batch_size": 2},
        {"packing": "off"},
        range(8),
    ),
    "noise, tied head": ({"tie_word_embeddings": True}, {"neftune_alpha": 5.0}, {}, range(8)),
    "DoRA": ({"use_dora": True}, {}, {}, range(8)),
    "shared beginnings": ({}, {}, {"train": make_shared_rows(8)}, range(8)),
}


def take_step(case, directory, processes):
    """Return the gradients, the loss and the evaluation of one step, and the bytes kept here."""
    made, knobs, changes, rows = STEPS[case]
    is_dora = "use_dora" in made
    model = shaken(add_lora(make_model("llama"), **made) if is_dora else make_adapter(**made))
    own = whole = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    if processes.are_many:
        table = shard_base(model, torch.device("cpu"), processes)
        own = table.own_bytes + table.whole_bytes
    changes = {"train": make_weighted_rows(20)} | changes
    request = make_request(
        model,
        directory / "run",
        evaluation=make_weighted_rows(5, seed=4),
        processes=processes,
        is_sharded=processes.are_many,
        without=frozenset({"fused_blocks"}),
        **changes,
    )
    with ExitStack() as stack:
        setup = add_protection(set_up(make_config(**knobs), request, stack), request)
        stopping = Stopping(processes, Interruption())
        reduction = Reduction(model, stopping) if processes.are_many else None
        step = TrainingStep(setup, name_sources(request.train), processes, reduction)
        inputs = setup.collator([{"row": row} for row in rows])
        loss = step.run(inputs, 0, lambda one: one.backward(), loss_scale=1.0)
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        first = len(request.train)
        evaluated = step.evaluate({"all": range(first, first + 5)}, lambda: False)
    return found, loss.item(), evaluated, (own, whole), setup.choices


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes and one make of the same cases."""
    directory = tmp_path_factory.mktemp("shards")

    def everything(processes):
        where = directory / str(processes.world_size)
        where.mkdir(exist_ok=True)
        with processes.connected("cpu"):
            return {case: take_step(case, where, processes) for case in STEPS}

    return *call_in_processes(directory, 2, everything), everything(ALONE)


@pytest.mark.parametrize("case", STEPS)
def test_a_step_over_a_sharded_base_is_that_of_one_process(both, case):
    *several, alone = both
    wanted, loss, evaluated, (whole, _), _ = alone[case]
    size = max(gradient.abs().max().item() for gradient in wanted.values())
    for each in several:
        found, found_loss, found_evaluated, (own, _), choices = each[case]
        assert largest_difference(found, wanted) <= 1e-6 * max(size, 1)
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert found_evaluated == pytest.approx(evaluated, rel=1e-5)
        assert own < whole
        assert ("fused" in choices["LoRA layers"]) == (case != "DoRA")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: add_lora(make_model("llama"), modules_to_save=["input_layernorm"]),
            "trained whole",
        ),
        (lambda: with_shared_layers(make_adapter()), "its layers share weights"),
        (lambda: without_layers(make_adapter()), "does not say what its layers are"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(model, message):
    with pytest.raises(LlmtuneError, match=message) as refused:
        shard_base(model(), torch.device("cpu"), ALONE)
    assert "set train.shard=none" in str(refused.value)


def with_shared_layers(model):
    layers = model.get_base_model().model.layers
    layers[1].mlp.up_proj.base_layer.weight = layers[0].mlp.up_proj.base_layer.weight
    return model


def without_layers(model):
    model.get_base_model().model.layers = torch.nn.ModuleList()
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.quantization={method: nf4}"], "nf4 packs them into bytes"),
        (["protect.kl_to_base={}"], "without protect.kl_to_base"),
        (["protect.replay={source: self}"], "the base's own text in protect.replay"),
    ],
)
def test_what_a_sharded_base_cannot_do_is_refused_in_the_config(tmp_path, settings, message):
    config = {"run_dir": "run", "model": {"base": "base"}, "data": {"train": [{"path": "rows"}]}}
    with pytest.raises(LlmtuneError, match=message) as refused:
        load_config(config, ["train.shard=full", *settings])
    assert "train.shard=none" in str(refused.value)


def private_bytes():
    """Return the memory that this process shares with nobody; mapped files are everybody's."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def watched_memory():
    """Yield a list that gets, at the end, by how much the private memory grew at most."""
    before, seen, is_done, grown = private_bytes(), [0], Event(), []

    def watch():
        while not is_done.wait(0.002):
            seen.append(private_bytes() - before)

    watching = Thread(target=watch)
    watching.start()
    try:
        yield grown
    finally:
        is_done.set()
        watching.join()
        grown.append(max(*seen, private_bytes() - before))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory")
def test_no_process_ever_has_the_whole_base_to_itself(tmp_path):
    """100 MB in 24 layers and seven files: a process gets its half and little more."""
    made = make_model(
        "llama", tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=24
    )
    made.save_pretrained(tmp_path, max_shard_size="16MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    layers = sum(parameter.nbytes for parameter in made.model.layers.parameters())
    config = ModelConfig.model_validate({"base": str(tmp_path), "dtype": "float32"})
    source = Checkpoint.open(tmp_path)

    def load(processes):
        with processes.connected("cpu"), watched_memory() as grown:
            load_live(
                config,
                source,
                None,
                cut=lambda live, base: shard_base(live.model, live.device, processes, base),
            )
        return grown[0]

    for grown in call_in_processes(tmp_path / "out", 2, load):
        # Room that was free already may hold a little of it.
        assert 0.4 * layers < grown < layers / 2 + 5 * layers / 24, f"{grown:,} of {layers:,}"


def test_a_base_that_would_be_converted_whole_in_every_process_is_refused(tmp_path):
    make_model("llama", tmp_path)
    source = Checkpoint.open(tmp_path)
    config = ModelConfig.model_validate({"base": str(tmp_path), "dtype": "bfloat16"})
    with pytest.raises(LlmtuneError, match="stored in float32 and would be trained in bfloat16"):
        load_model(config, source, stays_mapped=True)
