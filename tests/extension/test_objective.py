"""A new objective is one file and one entry in the union: it trains, logs a metric and resumes."""

import hashlib
import json

from tests.extension.house import House
from tests.project import make_project

SMOOTHED = '''"""Label smoothing: all tokens get a share of the probability (arXiv:1512.00567)."""

from typing import Literal

from pydantic import Field

from llmtune.training.objectives.base import Objective


class SmoothedObjective(Objective):
    """Cross-entropy with targets that give `smoothing` of their weight to all tokens alike."""

    method: Literal["smoothed"]
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="Share for all tokens.")

    def loss(self, model, micro_batch, head):
        """Return the weighted sum of the smoothed cross-entropies (nats)."""
        from llmtune.training.loss import target_logits

        log_probs = target_logits(model, micro_batch).log_softmax(dim=-1)
        targets = micro_batch["targets"][:, None]
        uniform = -log_probs.mean(dim=-1)
        losses = -(1 - self.smoothing) * log_probs.gather(1, targets)[:, 0]
        losses = losses + self.smoothing * uniform
        micro_batch["uniform"] = (uniform.detach() * micro_batch["target_weights"]).sum()
        return (losses * micro_batch["target_weights"]).sum()

    def metrics(self, sources, device):
        """Return the mean cross-entropy under the uniform distribution."""
        return UniformLosses()


class UniformLosses:
    """Means over the steps since the last line of metrics."""

    def __init__(self):
        self._sums, self._steps = [], 0

    def prepare(self, micro_batch):
        """Nothing has to be filled."""

    def add(self, micro_batch):
        """Keep the micro-batch's share of the step's mean."""
        self._sums.append(micro_batch["uniform"])

    def take(self):
        """Return the mean of the step that is logged."""
        taken = {"uniform_loss": sum(one.item() for one in self._sums)}
        self._sums = []
        return taken

    def open_sums(self):
        """Return the sum since `take`."""
        return [sum(one.item() for one in self._sums)]

    def restore(self, sums):
        """Continue from it."""
        import torch

        self._sums = [torch.tensor(one) for one in sums if one]
'''


def adapter_hash(run):
    return hashlib.sha256((run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def metrics_of(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_a_new_objective_trains_logs_its_metric_and_resumes(tmp_path):
    house = House(tmp_path / "house")
    house.add("training/objectives/smoothed.py", SMOOTHED)
    house.enter(
        "training/objectives/__init__.py",
        {
            "ObjectiveConfig = SftObjective\n": "from typing import Annotated\n"
            "from pydantic import Field\n"
            "from llmtune.training.objectives.smoothed import SmoothedObjective\n"
            "ObjectiveConfig = Annotated["
            'SftObjective | SmoothedObjective, Field(discriminator="method")]\n'
        },
    )
    config = make_project(tmp_path / "project")
    runs = {name: tmp_path / name for name in ("plain", "smoothed", "resumed")}
    smoothed = "train.objective={method: smoothed, smoothing: 0.3}"

    def train(name, *overrides):
        return ["train", str(config), f"run_dir={runs[name]}", "train.save_every=1", *overrides]

    house.run_in_turn(train("plain"), train("smoothed", smoothed), cwd=tmp_path)
    logged = metrics_of(runs["smoothed"])
    assert all(line["uniform_loss"] > 0 for line in logged)
    assert not any("uniform_loss" in line for line in metrics_of(runs["plain"]))
    assert adapter_hash(runs["smoothed"]) != adapter_hash(runs["plain"])

    program = (
        "import os, signal\n"
        "from llmtune.training.trainer import AdapterTrainer\n"
        "step = AdapterTrainer.training_step\n"
        "def stopped(self, *inputs):\n"
        "    if self.state.global_step == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, *inputs)\n"
        "AdapterTrainer.training_step = stopped\n"
        "from llmtune.config import load_config\n"
        "from llmtune.errors import RunInterrupted\n"
        "from llmtune.runs.pipeline import train\n"
        f"config = load_config({str(config)!r}, ['run_dir={runs['resumed']}', "
        f"'train.save_every=1', {smoothed!r}])\n"
        "try: train(config)\n"
        "except RunInterrupted: pass\n"
        "else: raise SystemExit('was not interrupted')\n"
    )
    house.execute(program, cwd=tmp_path)
    assert not (runs["resumed"] / "adapter").exists()
    house.run(*train("resumed", smoothed), cwd=tmp_path)
    assert adapter_hash(runs["resumed"]) == adapter_hash(runs["smoothed"])
    assert [line["uniform_loss"] for line in metrics_of(runs["resumed"])] == [
        line["uniform_loss"] for line in logged
    ]
