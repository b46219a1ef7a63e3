"""The train stage: rows and base in, adapter out."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, TypedDict, cast

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.config import RunConfig
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.data.length import refuse_positions
from llmtune.data.prepare import PreparedData, prepare_examples
from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.exporting.config import find_route
from llmtune.io.fingerprint import JsonObject, hash_json
from llmtune.io.manifest import BaseRecord, Manifest, StageRecord, TrainRecord
from llmtune.io.processes import Processes, joined_processes, refuse_unjoined
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.template_date import template_date_of
from llmtune.runs.ledger import Ledger, has_training, refuse_unusable
from llmtune.runs.stage import Stage, deciding_knobs, deciding_knobs_of

if TYPE_CHECKING:
    from llmtune.evaluation.price import QuantizationPrice
    from llmtune.planning.devices import Device
    from llmtune.planning.workload import PlanRequest
    from llmtune.training.adapt import AdaptedBase

log = logging.getLogger("llmtune")


class TrainStage(Stage[TrainRecord]):
    """Fit an adapter and save it in `adapter/`; continue from a checkpoint if there is one."""

    name = "train"
    is_first = True

    def __init__(
        self, config: RunConfig, *, force: bool = False, opened: Checkpoint | None = None
    ) -> None:
        super().__init__(config, force=force, opened=opened)
        self._interrupted_by: str | None = None
        self._dtype = "auto"

    def check(self) -> None:
        """Find everything that can be wrong with the input; the rows are read and tokenized."""
        from llmtune.training.config import check_reporters

        config = self.config
        refuse_unjoined()
        check_reporters(config.train.report_to)
        values = config.model_dump(mode="json")
        refuse_unusable(config.run, values, deciding_knobs_of, force=self.force)
        for settings in config.export.exports():
            log.info("export: %s", find_route(self.source, settings))
        self.data  # noqa: B018 (prepared here, before the run is opened)

    @cached_property
    def data(self) -> dict[str, PreparedData]:
        """The rows of both splits, and those that `protect` holds the model to, tokenized."""
        return prepare_data(self.config, self.source)

    @cached_property
    def _content(self) -> dict[str, str]:
        config = self.config
        inputs = {
            "base": self.source.fingerprint,
            "data": hash_json({name: prepared.fingerprint for name, prepared in self.data.items()}),
            "config": hash_json(deciding_knobs(config)),
        }
        if config.adapter.init_from is not None:
            inputs["start"] = adapter_fingerprint(config.adapter.init_from)
        return inputs

    def inputs(self, manifest: Manifest) -> dict[str, str]:
        """Return the hashes of what decides the adapter: base, rows and order, and the knobs.

        Once there is training the recorded hash of the knobs is kept: the ledger has compared the
        knobs themselves, key by key, and an older version hashed fewer of them.
        """
        record = manifest.record(self.name)
        known = (record.get("inputs") or {}).get("config")
        if known is None or not has_training(self.config.run):
            return self._content
        return {**self._content, "config": known}

    def outputs(self, record: StageRecord) -> Iterator[Path]:
        """Yield the adapter's directory."""
        yield self.config.run.adapter_dir

    def run(self, inputs: JsonObject) -> TrainRecord:
        """Train, and return what the manifest records: steps, tokens, losses, choices and more."""
        from llmtune.planning.workload import estimate_training
        from llmtune.training.metrics import count_rows
        from llmtune.training.train import train_adapter

        config, rows, processes = self.config, self.data, joined_processes()
        identity = {name: str(value) for name, value in inputs.items()}
        price = self._measure_price()
        estimate = estimate_training(self._plan_request(), rows["train"], rows["evaluation"])
        with processes.ordering(self._order(identity)), self._sharing_base(processes) as is_shared:
            adapted = self._adapt(identity, processes)
            if not is_shared:
                processes.share(lambda: {"own text": adapted.own_text_hash()})
            result = train_adapter(config.train, adapted.request)
            values = config.model_dump(mode="json")
            record = adapted.save(result, values, config.train.batch_size)
        recorded = {**dataclasses.asdict(result), "estimate": estimate, **record}
        seen = result.steps * config.train.batch_size
        counted = count_rows(config.run.metrics_path, len(rows["train"].examples), seen)
        recorded["rows"] = dataclasses.asdict(counted)
        recorded["quantization_price"] = None if price is None else dataclasses.asdict(price)
        self._interrupted_by = recorded.pop("interrupted_by")
        return cast(TrainRecord, recorded)

    def _order(self, identity: Mapping[str, str]) -> "TrainOrder":
        return {
            "stage": self.name,
            "config": self.config.model_dump(mode="json"),
            "dtype": self._dtype,
            "date": self.source.template_date,
            "identity": dict(identity),
        }

    def follow(self, order: "TrainOrder", processes: Processes) -> None:
        """Do this process's share of a training that the first process has ordered.

        Raises:
            LlmtuneError: this process finds a different base or other rows than the first one.
        """
        from llmtune.training.train import train_adapter

        self._dtype = order["dtype"]
        found, wanted = self._content, order["identity"]
        other = [name for name in found if name != "config" and found[name] != wanted[name]]
        if other:
            raise LlmtuneError(
                f"on {gethostname()} the {' and the '.join(other)} differ from what the first "
                "process has (compared by content): all machines need the same files, and the same "
                "versions of the libraries"
            )
        with self._sharing_base(processes) as is_shared:
            # by now what the first one quantized and wrote is cached
            written = {} if is_shared else processes.share(dict)
            adapted = self._adapt(wanted, processes)
            if not is_shared and written["own text"] != adapted.own_text_hash():
                raise LlmtuneError(
                    f"on {gethostname()} the base writes different text of its own than in the "
                    "first process: let all machines have one cache directory (LLMTUNE_CACHE), or "
                    "take the text that `protect` needs from a file"
                )
            train_adapter(self.config.train, adapted.request)
            adapted.help_saving()

    @contextmanager
    def _sharing_base(self, processes: Processes) -> Iterator[bool]:
        """Connect the processes while each has a part of the base; yield whether it is so."""
        if self.config.train.shard == "none" or not processes.are_many:
            yield False
            return
        from llmtune.models.hardware import choose_device

        device = choose_device(self.config.model.device)
        with processes.connected(device.type), processes.watching():
            yield True

    def _adapt(self, identity: Mapping[str, str], processes: Processes) -> "AdaptedBase":
        from llmtune.training.adapt import TrainRows, adapt_base

        config, rows = self.config, self.data
        return adapt_base(
            self.source,
            self._model,
            config.adapter,
            config.protect,
            TrainRows(rows["train"], rows["evaluation"], rows.get("protect")),
            packing=config.data.packing,
            run=config.run,
            seed=config.seed,
            identity=identity,
            processes=processes,
            shard=config.train.shard == "full",
        )

    def _measure_price(self) -> "QuantizationPrice | None":
        """Say what the quantization costs on general text, before the base is loaded to train."""
        from llmtune.evaluation.price import measure_price
        from llmtune.reporting.suites import Thresholds

        found = measure_price(self.config.model, self.source)
        if found is None:
            return None
        bound = Thresholds().general_loss_rise
        is_high = found.price is not None and found.price > bound / 2
        for line in found.lines(bound):
            log.log(logging.WARNING if is_high else logging.INFO, "quantization: %s", line)
        return found

    def _plan_request(self) -> "PlanRequest":
        """Ask for what this machine's free memory is now, before the base is loaded."""
        from llmtune.models.hardware import choose_device
        from llmtune.planning.devices import free_device

        device = free_device(str(choose_device(self.config.model.device)))
        request = plan_request(self.config, device)
        cards = joined_processes().world_size
        return dataclasses.replace(request, model=self._model, opened=self.source, cards=cards)

    @property
    def _model(self) -> ModelConfig:
        """How the base is loaded: in the precision that the run began with."""
        return self.config.model.model_copy(update={"dtype": self._dtype})

    def _choose_dtype(self) -> str:
        from llmtune.models.hardware import choose_device, choose_dtype

        model = self.config.model
        dtype = choose_dtype(model.dtype, choose_device(model.device), self.source.model_type)
        return str(dtype).removeprefix("torch.")

    def before(self, ledger: Ledger) -> None:
        """Refuse an adapter of other inputs, and describe base and rows in the manifest."""
        inputs = self.inputs(ledger.manifest)
        if self.config.run.adapter_dir.is_dir():
            self._refuse_other(ledger.manifest.record(self.name), inputs)
        began = ledger.manifest.base.get("dtype") if has_training(self.config.run) else None
        self._dtype = began or self._choose_dtype()
        base: BaseRecord = {**ledger.manifest.base, **self.source.as_record()}
        base["dtype"] = self._dtype
        date = template_date_of(self.source.tokenizer)
        if date is not None:
            base["template_date"] = date
        ledger.describe(
            base=base,
            data={name: prepared.report.to_json() for name, prepared in self.data.items()},
        )

    def after(self, ledger: Ledger, result: TrainRecord) -> None:
        """Describe the base's precision in the manifest.

        Raises:
            RunInterrupted: Ctrl-C or SIGTERM came during the last step; the adapter is saved.
        """
        base: BaseRecord = {**ledger.manifest.base, "dtype": result["dtype"]}
        base["quantization"] = self.config.model.quantization_method
        ledger.describe(base=base)
        if self._interrupted_by:
            raise RunInterrupted(
                f"stopped by {self._interrupted_by} after the last step; the adapter is saved. The "
                "same command continues from here."
            )

    def _refuse_other(self, record: StageRecord, inputs: Mapping[str, str]) -> None:
        """Refuse to continue with an adapter of a different base, rows or start."""
        known = record.get("inputs", inputs)
        other = [name for name in inputs if known.get(name) != inputs[name]]
        if other:
            raise LlmtuneError(
                f"{self.config.run.path}: its adapter was trained on a different "
                f"{' and '.join(other)} (compared by content); choose another run_dir, or redo "
                "this one with --force"
            )


class TrainOrder(TypedDict):
    """What the first process tells the others of a training, as JSON values."""

    stage: str
    config: JsonObject
    dtype: str
    date: str | None
    identity: dict[str, str]


def plan_request(config: RunConfig, device: "Device", *, measure: bool = False) -> "PlanRequest":
    """Return what a plan of a run is made from, for a device."""
    from llmtune.planning.workload import PlanRequest

    return PlanRequest(
        model=config.model,
        adapter=config.adapter,
        data=config.data,
        train=config.train,
        run_dir=config.run_dir,
        seed=config.seed,
        device=device,
        protect=config.protect,
        measure=measure,
    )


def prepare_data(config: RunConfig, source: Checkpoint) -> dict[str, PreparedData]:
    """Tokenize the rows of both splits, and those that `protect` holds the model to.

    Raises:
        LlmtuneError: rows cannot be used, or are in both splits.
    """
    tokenizer = source.tokenizer
    prepared = {
        "train": prepare_examples(config.mixed_data, tokenizer, split="train", seed=config.seed),
        "evaluation": prepare_examples(
            config.data, tokenizer, split="evaluation", seed=config.seed
        ),
    }
    penalty = config.protect.kl_to_base
    if penalty is not None and isinstance(penalty.source, SourceConfig):
        general = DataConfig(train=[penalty.source], cache=config.data.cache)
        prepared["protect"] = prepare_examples(general, tokenizer, split="train", seed=config.seed)
    for name, data in prepared.items():
        refuse_positions(data.examples, source.num_positions, name)
        for line in data.report.lines():
            log.info("%s", line.replace(f"{data.report.split}:", f"{name} data:", 1))
    return prepared
