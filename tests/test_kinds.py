"""Contract: a kind is named in its own folder and nowhere else in the package.

The members of a union carry their behavior. A room that asks which member it holds, by its name
or by its class, has to be changed with every new member; so no room may. What a room needs of a
kind it asks the member itself.
"""

import re

import pytest

from tests.kinds import KINDS, PACKAGE, ROOT, offences


@pytest.mark.parametrize("name", sorted(KINDS))
def test_no_room_names_a_member_of_a_kind_that_it_does_not_own(name):
    kind = KINDS[name]
    found = {
        str(path.relative_to(ROOT)): offences(kind, path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.is_relative_to(PACKAGE / kind.folder)
        and str(path.relative_to(PACKAGE)) not in kind.makers
    }
    found = {path: places for path, places in found.items() if places}
    assert not found, f"{name}: {found}"


def test_no_template_of_the_page_names_a_member():
    names = {name for kind in KINDS.values() for name in kind.names - kind.words}
    quoted = re.compile(rf"""["'](?:{"|".join(map(re.escape, sorted(names)))})["']""")
    templates = sorted(PACKAGE.rglob("*.j2"))
    assert templates
    assert not {
        path.name: found for path in templates if (found := quoted.findall(path.read_text()))
    }


def test_every_kind_knows_its_members_by_name_class_and_file():
    for name, kind in KINDS.items():
        assert kind.names, name
        assert {member.__name__ for member in kind.members} <= kind.classes, name
        assert kind.modules, name
    assert "ContaminationResult" in KINDS["diagnosis"].classes
    assert KINDS["quantization"].modules >= {"four_bit", "nf4", "none"}


PLANTED = {
    "dataset format": (
        'if found.format == "text": pass',
        'if name == "sharegpt": pass',
        'message = "set format: completion, or leave it out"',
        'words = f"set format: sharegpt for {column}"',
        'COLUMNS = ("messages", "instruction")',
        "import llmtune.data.formats.text",
        "from llmtune.data.formats import ShareGptFormat",
        "from llmtune.data import formats\nformats.TextFormat()",
    ),
    "objective": (
        'request(objective="sft")',
        "from llmtune.training.objectives import SftObjective",
        "isinstance(objective, objectives.SftObjective)",
    ),
    "exporter": (
        'commands = f"llmtune export RUN --to ollama {name}"',
        'if exporter.name == "hub": pass',
        "import llmtune.exporting.gguf as writer",
        "from llmtune.exporting.config import HubExporter",
    ),
    "cluster engine": (
        'if settings.on == "slurm": pass',
        'message = "hand it in with --on k8s"',
        "from llmtune.launching.config import SkyEngine",
        "import llmtune.launching.ray",
    ),
    "adapter method": (
        'match adapter.method:\n    case "lora" | "dora": pass',
        'LAYERS = {"lora": 1, "rslora": 2}',
        'ADVICE = "use adapter.method=rslora"',
        "from llmtune.adapters import low_rank",
    ),
    "diagnosis": (
        'found = diagnostics["stops"]',
        "leaked = evidence.contamination",
        "knobs.probe = True",
        "measure(evaluate.with_knobs(memorization=True))",
        'ORDER = ("base", "probe", "tuned")',
        'advice = "set evaluate.stops=false"',
        "def show(found: 'ContaminationResult'): pass",
        "def show(found: LearningCurveResult): pass",
        "from llmtune.evaluation.diagnosis.stops import StopCount",
        'import_module("llmtune.evaluation.diagnosis.shift")',
    ),
    "quantization": (
        'if base.get("quantization") in (None, "none"): pass',
        'UNQUANTIZED = "none"',
        'Method = Literal["nf4", "other"]',
        'def load(quantization="none"): pass',
        'bits = {"nf4": 4}[method]',
        'raise Wrong(f"quantize {base} with method=nf4")',
        "from llmtune.models.quantization.config import Nf4Quantization",
        "from ..models.quantization import four_bit",
    ),
    "stored format": (
        'if knobs["quant_method"] == "gptq": pass',
        'if format.method == "fp8": pass',
        'message = "an awq checkpoint"',
        "from llmtune.models.stored.formats import GptqFormat",
        "import llmtune.models.stored.compressed_tensors",
    ),
    "suite task": (
        'is_choice = any(suite.task == "choice" for suite in suites)',
        'draft(task="choice" if labels else "exact")',
        'write = {"choice": lines, "chat": turns}',
        'match suite.task:\n    case "perplexity": pass',
        'task: Literal["exact"] = read()',
        'if suite.config.task.startswith("choice"): pass',
        "isinstance(config, tasks.ChoiceSuite)",
    ),
}
"""By kind: lines that name a member, each in a different way."""


@pytest.mark.parametrize("name", sorted(KINDS))
def test_each_way_to_name_a_member_is_seen(name):
    unseen = [source for source in PLANTED[name] if not offences(KINDS[name], source)]
    assert not unseen


def test_an_offence_says_where_and_what():
    assert offences(KINDS["quantization"], '"""About nf4."""\n\nx = "nf4"\n') == [
        "line 3: the literal 'nf4'"
    ]


ALLOWED = {
    "dataset format": (
        '"""sharegpt"""',
        'row["text"]',
        'part = {"type": "text"}',
        "from llmtune.data.formats.base import Row",
        'if conversation.kind == "text": pass',
    ),
    "exporter": ('path.suffix == ".gguf"', 'message = "a .gguf file or a hub id"'),
    "diagnosis": (
        'message = "the run stops; no shift is found"',
        "from llmtune.evaluation.diagnosis.config import DIAGNOSES",
        "from llmtune.experiments import learning_curve\nlearning_curve.run()",
    ),
    "quantization": ('loss(x, reduction="none")', 'table.change != "none"'),
    "stored format": ("import bitsandbytes as bnb", 'path.suffix == ".gguf"'),
    "suite task": ('choice = response["choice"]', 'ABILITY_WORDS = {"chat": "open chat"}'),
}
"""By kind: lines in which a name means something else."""


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_word_that_means_something_else_is_left_alone(name):
    seen = [source for source in ALLOWED[name] if offences(KINDS[name], source)]
    assert not seen
