"""A judgment: the whole report for an adapter or a model that no run of llmtune has trained."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from llmtune.adapters.manifest import CONFIG_NAME, adapter_fingerprint, read_adapter_config
from llmtune.config import RunConfig
from llmtune.data.config import NO_ROWS, DataConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.main_arms import MAIN_ARMS, MainArm
from llmtune.evaluation.suite import load_suites
from llmtune.io.cached import cache_dir
from llmtune.io.fingerprint import hash_json
from llmtune.io.json_files import read_json_object
from llmtune.io.manifest import EvaluateRecord, Manifest, MergeRecord, is_judgment, read_manifest
from llmtune.io.run_dir import RunDir, atomic_write_text
from llmtune.io.validation import validate_section
from llmtune.io.yaml_source import SourcedTree, apply_overrides
from llmtune.merging.config import MergeConfig
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.hub import fetch_adapter, reads_as_hub_id
from llmtune.models.resolve import resolve_base
from llmtune.models.template_date import template_date_of
from llmtune.runs.evaluate import EvaluateStage
from llmtune.runs.ledger import Ledger, open_ledger
from llmtune.runs.merge import MergeStage
from llmtune.runs.stage import Result, Stage
from llmtune.runs.targets import TEMPLATE_NAME, YAML_SUFFIXES, BaseKeys, adapter_base
from llmtune.schema import Section

if TYPE_CHECKING:
    from llmtune.evaluation.session import EvaluationRequest
    from llmtune.reporting.report import Report

log = logging.getLogger("llmtune")

RUNS_DIR = Path("runs")
ARMS_OF_MODEL: tuple[MainArm, ...] = ("original", "merged")
RECORDED = {"run_dir", "seed", "model", "data", "merge", "evaluate"}
NO_SUITES = (
    "no suites: name them with --suites FILE... The suites general and chat ship with llmtune; "
    "one for your own task is written from your rows by: llmtune init --eval DATA.jsonl"
)


class JudgedModels(Section):
    """What is judged. With `adapter`, `merged` is a merge of it; alone it is the model itself."""

    name: str
    """As the user gave it."""
    adapter: Path | None = None
    merged: Path | None = None


class JudgmentKeys(TypedDict, total=False):
    """The keys of a judgment before they are validated, as far as they are set by name."""

    run_dir: str
    judged: Mapping[str, str | None]
    model: Mapping[str, object]
    evaluate: Mapping[str, object]


class Judgment(Section):
    """What a judgment needs, as its manifest keeps it."""

    run_dir: Path
    seed: int = 0
    judged: JudgedModels
    model: ModelConfig
    data: DataConfig | None = None
    """The rows that were trained on, if anyone knows them."""
    merge: MergeConfig = MergeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def as_run(self) -> RunConfig:
        """Return the config of the stages, which are those of a run."""
        return RunConfig(
            run_dir=self.run_dir,
            seed=self.seed,
            model=self.model,
            data=self.data or NO_ROWS,
            merge=self.merge,
            evaluate=self.evaluate,
        )


@dataclass(frozen=True)
class Asked:
    """What the user asks to be judged, in the words of the command line."""

    name: str
    """An adapter directory, a model, a hub id of either, or the directory of a judgment."""
    base: str | None = None
    suites: Sequence[str] = ()
    merged: Path | None = None
    is_merged: bool = True
    """Whether the merged model of an adapter is judged, too."""
    quantization: str | None = None
    out: Path | None = None
    overrides: Sequence[str] = ()


def judge(judgment: Judgment, *, force: bool = False) -> "Report":
    """Merge (an adapter), evaluate and report; what is finished on unchanged inputs is skipped.

    The directory is laid out like a run's, with links to the adapter or model that is judged.

    Raises:
        LlmtuneError: the input is wrong.
        CheckFailed: the merge differs from base + adapter.
    """
    from llmtune.runs.pipeline import report

    for stage in _stages(judgment, force=force):
        stage.do()
    return report(judgment.run_dir)


def prepare_judgment(asked: Asked) -> Judgment:
    """Find out what `asked` names, what it is compared with, and where the judgment goes.

    Raises:
        LlmtuneError: it is neither an adapter nor a model, or it does not fit the options; no base
            or no suite is named.
    """
    path = Path(asked.name).expanduser()
    if path.suffix in YAML_SUFFIXES:
        raise LlmtuneError(f"{asked.name}: is a config; train and judge it with: llmtune run")
    is_recorded = (path / "manifest.json").is_file()
    values = _recorded(asked, path) if is_recorded else _describe(asked, path)
    if asked.base is not None:
        values["model"] = {**values.get("model", {}), "base": asked.base, "revision": None}
    if asked.suites:
        values["evaluate"] = {**values.get("evaluate", {}), "suites": list(asked.suites)}
    if asked.quantization is not None:
        values["model"] = {**values["model"], "quantization": {"method": asked.quantization}}
    tree = apply_overrides(
        SourcedTree(dict(values), {(): f"llmtune judge {asked.name}"}), asked.overrides
    )
    return _settle(validate_section(Judgment, tree), asked)


def _settle(found: Judgment, asked: Asked) -> Judgment:
    """Refuse what cannot be judged, and choose the arms and the chat template."""
    judged, knobs = found.judged, found.evaluate
    if not knobs.suites:
        raise LlmtuneError(NO_SUITES)
    suites = load_suites(knobs)
    if judged.adapter is None:
        for option, is_given in (
            ("--merged", asked.merged is not None),
            ("--no-merge", not asked.is_merged),
            ("--quantization", found.model.storage.is_quantized),
        ):
            if is_given:
                raise LlmtuneError(f"{option}: is for adapters, and {judged.name} is a whole model")
    whole = judged.adapter is None
    arms = ARMS_OF_MODEL if whole else MAIN_ARMS if asked.is_merged else MAIN_ARMS[:-1]
    chosen = tuple(arm for arm in knobs.arms if arm in arms)
    if not chosen:
        raise LlmtuneError(f"evaluate.arms: {judged.name} has {', '.join(arms)}; name one of them")
    model = found.model
    if model.chat_template is None and any(getattr(s.config, "chat", False) for s in suites):
        model = model.model_copy(update={"chat_template": _find_template(judged, model)})
    evaluate = knobs.model_copy(update={"arms": chosen})
    return found.model_copy(update={"evaluate": evaluate, "model": model})


def _recorded(asked: Asked, path: Path) -> "JudgmentKeys":
    """Return what a judgment was made of, to continue or extend it."""
    config = dict(read_manifest(RunDir(path)).config)
    if not is_judgment(config):
        raise LlmtuneError(
            f"{path}: is a run, which has a report of its own: llmtune report {path}. "
            f"Its adapter alone is {path / 'adapter'}"
        )
    given = {"--merged": asked.merged, "--out": asked.out}
    misplaced = [option for option, value in given.items() if value is not None]
    if misplaced:
        raise LlmtuneError(
            f"{' and '.join(misplaced)}: {path} is a judgment, which keeps its models and its "
            "place; judge the adapter or the model itself"
        )
    return cast(JudgmentKeys, {**config, "run_dir": str(path)})


def _describe(asked: Asked, path: Path) -> "JudgmentKeys":
    adapter = _find_adapter(asked.name, path)
    model: BaseKeys
    if adapter is not None:
        merged = asked.merged
        if merged is not None and not (merged / "config.json").is_file():
            raise LlmtuneError(f"--merged {merged}: not a model (no config.json)")
        model = {} if asked.base else adapter_base(adapter)
        template = adapter / TEMPLATE_NAME
        if template.is_file():
            model["chat_template"] = str(template)
    else:
        if asked.base is None:
            raise LlmtuneError(
                f"{asked.name}: is not an adapter, so it is judged as a whole model; say which "
                "model it was made from: --base MODEL"
            )
        merged = resolve_base(ModelConfig(base=asked.name)).directory
        model = {}
    name = path.name if path.name != "adapter" else path.absolute().parent.name
    judged: Mapping[str, str | None] = {
        "name": asked.name,
        "adapter": str(adapter.resolve()) if adapter else None,
        "merged": str(merged.resolve()) if merged else None,
    }
    out = asked.out or RUNS_DIR / f"{name.removesuffix('.gguf') or 'model'}-judged"
    return {"run_dir": str(out), "judged": judged, "model": model}


def _find_adapter(name: str, path: Path) -> Path | None:
    """Return the directory of the adapter that a path or a hub id names; None if it is a model."""
    if (path / CONFIG_NAME).is_file():
        read_adapter_config(path)
        return path
    if path.exists() or not reads_as_hub_id(name):
        return None
    found = fetch_adapter(name)
    if found is not None:
        read_adapter_config(found)
    return found


def _find_template(judged: JudgedModels, model: ModelConfig) -> Path | None:
    """Return a file of the chat template that both sides are asked in; None for each one's own.

    An adapter's is the one saved beside it, which older tools keep inside `tokenizer_config.json`.
    A whole model brings its own for a base that has none.
    """
    if judged.adapter is not None:
        text = _template_in(judged.adapter / "tokenizer_config.json")
    elif judged.merged is not None and not resolve_base(model).tokenizer.chat_template:
        text = Checkpoint.open(judged.merged).tokenizer.chat_template
    else:
        text = None
    if not isinstance(text, str) or not text:
        return None
    log.info("judge: both are asked in the chat template of %s", judged.name)
    path = cache_dir() / "templates" / f"{hash_json(text)[:32]}.jinja"
    if not path.is_file():
        atomic_write_text(path, text)
    return path


def _template_in(path: Path) -> object:
    try:
        return read_json_object(path).get("chat_template")
    except LlmtuneError:
        return None  # an adapter without a tokenizer of its own: the base's template is used


class _JudgedStage(Stage[Result]):
    """A stage on an adapter or model from elsewhere, which the directory links to."""

    def __init__(
        self,
        judgment: Judgment,
        *,
        force: bool = False,
        opened: Checkpoint | None = None,
        is_first: bool = True,
    ) -> None:
        super().__init__(judgment.as_run(), force=force, opened=opened)
        self.is_first = is_first
        self.judged = judgment.judged

    def open(self) -> AbstractContextManager[Ledger]:
        """Hold the directory; one of a run, or of a different adapter, is refused."""
        run = self.config.run
        if run.manifest_path.is_file() and not is_judgment(read_manifest(run).config):
            raise LlmtuneError(f"{run.path}: holds a run; choose another place with --out")
        values = self.config.model_dump(mode="json", include=RECORDED)
        if not self.config.data.train:
            values["data"] = None
        values["judged"] = self.judged.model_dump(mode="json")
        return open_ledger(
            run,
            values,
            deciding=lambda config: {"judged": config.get("judged")},
            force=self.is_first and self.force,
        )

    def before(self, ledger: Ledger) -> None:
        """Link to what is judged, and describe the base in the manifest."""
        run, judged = self.config.run, self.judged
        for link, target in ((run.adapter_dir, judged.adapter), (run.merged_dir, judged.merged)):
            if target is not None and not link.is_symlink():
                link.symlink_to(target)
        date = template_date_of(self.source.tokenizer)
        base = self.source.as_record()
        base["quantization"] = self.config.model.quantization_method
        if date is not None:
            base["template_date"] = date
        ledger.describe(base=base)

    @property
    def adapter(self) -> str:
        """The fingerprint of the adapter; empty for a whole model."""
        return adapter_fingerprint(self.judged.adapter) if self.judged.adapter else ""


class JudgedMerge(_JudgedStage[MergeRecord], MergeStage):
    """The merge of a judged adapter."""


class JudgedEvaluate(_JudgedStage[EvaluateRecord], EvaluateStage):
    """The evaluation of a judged adapter or model."""

    def check_models(self) -> None:
        """Find nothing: they were found before."""

    def models(self, manifest: Manifest) -> dict[str, str | None]:
        """Return the fingerprints of what is scored."""
        merged = self.judged.merged
        return {
            "adapter": self.adapter,
            "base": self.source.fingerprint,
            "merge": Checkpoint.open(merged).fingerprint
            if merged
            else manifest.record("merge").get("fingerprint"),
            "data": hash_json(self.config.data.model_dump(mode="json")),
        }

    def request(self, inputs: Mapping[str, Any]) -> "EvaluationRequest":
        """Return what is evaluated; a whole model has no adapter to switch."""
        request = super().request(inputs)
        request = replace(request, trained=replace(request.trained, steps=None))
        if self.judged.adapter is not None:
            return request
        load = request.load
        return replace(
            request,
            has_adapter=False,
            load=lambda arm: load("base" if arm == "tuned" else arm),
        )


def _stages(judgment: Judgment, *, force: bool) -> Iterator[_JudgedStage[Any]]:
    judged, opened = judgment.judged, None
    if judged.merged is None and "merged" in judgment.evaluate.arms:
        merge = JudgedMerge(judgment, force=force)
        yield merge
        opened = merge.source
    yield JudgedEvaluate(judgment, force=force, opened=opened, is_first=opened is None)
