"""Which kinds there are, what their members are called, and where a source text names one.

Names and classes are read from the unions, so that the contract holds for a new member the moment
it is listed.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from llmtune.adapters.config import METHODS
from llmtune.data.formats import FORMATS
from llmtune.evaluation.diagnosis.config import DIAGNOSES
from llmtune.evaluation.tasks.config import TASKS
from llmtune.exporting.config import EXPORTERS
from llmtune.launching.config import ENGINES
from llmtune.models.quantization.config import members
from llmtune.models.stored.formats import FORMATS as STORED_FORMATS
from llmtune.training.objectives import DEFAULT_OBJECTIVE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmtune"


@dataclass(frozen=True)
class Kind:
    """One kind: the folder of its members, and the names that only this folder may hold."""

    folder: str
    members: tuple[type, ...]
    names: frozenset[str]
    """What the members are called in a config, on the command line or in a file."""
    fields: tuple[str, ...]
    """Words by which an expression speaks of the kind: `task` in `suite.task == "choice"`."""
    words: frozenset[str] = frozenset()
    """The names that mean other things too: they count only beside one of `fields`."""
    english: frozenset[str] = frozenset()
    """The names that sentences use too: in a longer text they count only beside a field."""
    owners: tuple[str, ...] = ()
    """What holds a value for each member under its name: `evaluate` in `evaluate.stops`."""
    makers: frozenset[str] = frozenset()
    """Files outside the folder that make a member's result, and so name it."""

    @cached_property
    def modules(self) -> frozenset[str]:
        """The files of the members, and of what only some of them have in common."""
        bases = (base for member in self.members for base in member.__mro__)
        names = {base.__module__ for base in bases}
        start = "llmtune." + self.folder.replace("/", ".") + "."
        files = {name.removeprefix(start) for name in names if name.startswith(start)}
        return frozenset(files - {"base"})

    @cached_property
    def classes(self) -> frozenset[str]:
        """The classes that these files define: members, their results, the parts of those."""
        return frozenset(
            node.name
            for module in self.modules
            for node in ast.parse(
                (PACKAGE / self.folder / f"{module}.py").read_text(encoding="utf-8")
            ).body
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        )


QUANTIZATIONS = frozenset(str(member.model_fields["method"].default) for member in members())
DIAGNOSED = frozenset(diagnosis.name for diagnosis in DIAGNOSES)

KINDS: dict[str, Kind] = {
    "dataset format": Kind(
        folder="data/formats",
        members=tuple(FORMATS.values()),
        names=frozenset(FORMATS),
        fields=("format", "formats"),
        # the others are called by the column that they read
        words=frozenset(FORMATS) - {"sharegpt"},
    ),
    "objective": Kind(
        folder="training/objectives",
        members=(type(DEFAULT_OBJECTIVE),),
        names=frozenset({DEFAULT_OBJECTIVE.method}),
        fields=("objective", "method"),
    ),
    "exporter": Kind(
        folder="exporting",
        members=tuple(type(exporter) for exporter in EXPORTERS),
        # an export in 4 bits is called by its quantization, which is a kind of its own
        names=frozenset(exporter.name for exporter in EXPORTERS) - QUANTIZATIONS,
        fields=("to", "exporter", "export", "exports"),
        words=frozenset({"gguf", "hub"}),
    ),
    "cluster engine": Kind(
        folder="launching",
        members=tuple(type(engine) for engine in ENGINES),
        names=frozenset(engine.name for engine in ENGINES),
        fields=("on", "engine", "engines"),
        english=frozenset({"sky", "ray"}),
    ),
    "adapter method": Kind(
        folder="adapters",
        members=METHODS,
        # "layers" is what a model has, in every room
        names=frozenset(method.name() for method in METHODS) - {"layers"}
        | {"LORA", "use_rslora", "use_dora", "lora_alpha"},
        fields=("adapter", "method", "methods"),
        # llama.cpp calls its own adapters lora too
        words=frozenset({"lora"}),
    ),
    "diagnosis": Kind(
        folder="evaluation/diagnosis",
        members=tuple(type(diagnosis) for diagnosis in DIAGNOSES),
        names=DIAGNOSED,
        fields=("diagnosis", "diagnostics", "evaluate"),
        english=DIAGNOSED,
        owners=("diagnosis", "diagnostics", "evaluate", "evidence", "knobs"),
        makers=frozenset({"experiments/learning_curve.py"}),
    ),
    "quantization": Kind(
        folder="models/quantization",
        members=members(),
        names=QUANTIZATIONS,
        fields=("quantization", "quantized", "unquantized", "method"),
        words=frozenset({"none"}),
    ),
    "stored format": Kind(
        folder="models/stored",
        members=STORED_FORMATS,
        names=frozenset(name for kind in STORED_FORMATS for name in (kind.method, *kind.aliases)),
        fields=("stored", "format", "method"),
        # a package, and formats of compute and of GGUF files
        words=frozenset({"bitsandbytes", "fp8", "mxfp4"}),
    ),
    "suite task": Kind(
        folder="evaluation/tasks",
        members=tuple(TASKS.values()),
        names=frozenset(TASKS),
        fields=("task", "tasks"),
        words=frozenset(TASKS),
    ),
}
"""Each kind that the contract holds for."""


def offences(kind: Kind, source: str) -> list[str]:
    """Return each place in a Python source that names a member of the kind."""
    return [f"line {line}: {what}" for line, what in sorted(set(_Reader(kind, source).find()))]


@cache
def _parse(source: str) -> tuple[list[ast.AST], dict[ast.AST, ast.AST]]:
    """Return every node of a source text, and the parent of each."""
    nodes = list(ast.walk(ast.parse(source)))
    return nodes, {child: node for node in nodes for child in ast.iter_child_nodes(node)}


class _Reader:
    """One source text, read for one kind."""

    def __init__(self, kind: Kind, source: str) -> None:
        self.kind = kind
        self.nodes, self.parents = _parse(source)
        self.package = "llmtune." + kind.folder.replace("/", ".")
        own = _any_of(kind.names - kind.words - kind.english | kind.classes)
        asked, fields = _any_of(kind.words | kind.english), _any_of(kind.fields)
        # a name of its own anywhere, a common word behind a field: `--to hub`, `format: text`
        self.in_text = re.compile(
            rf"(?<![\w.-])(?:{own})(?![\w-])"
            rf"|(?<!\w)(?:{fields})(?:\s*[.:=]\s*|\s)(?:{asked})(?![\w-])"
        )

    def find(self) -> Iterator[tuple[int, str]]:
        """Yield line and description of each offence."""
        for node in self.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if not self._is_docstring(node):
                    yield from self._in_literal(node, node.value)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                yield from self._in_import(node)
            elif isinstance(node, ast.Name) and node.id in self.kind.classes:
                yield node.lineno, f"the class {node.id}"
            elif isinstance(node, ast.Attribute) and node.attr in self.kind.classes:
                yield node.lineno, f"the class {node.attr}"
            elif isinstance(node, ast.Attribute | ast.keyword) and self._is_key(node):
                yield node.lineno, "a key of what holds one for each member"

    def _is_key(self, node: ast.Attribute | ast.keyword) -> bool:
        name = node.attr if isinstance(node, ast.Attribute) else node.arg
        owner = node.value if isinstance(node, ast.Attribute) else self.parents[node]
        return name in self.kind.names and self._speaks(owner, self.kind.owners)

    def _is_docstring(self, node: ast.Constant) -> bool:
        return isinstance(self.parents.get(node), ast.Expr)

    def _in_literal(self, node: ast.Constant, text: str) -> Iterator[tuple[int, str]]:
        if text in self.kind.words:
            if self._is_beside_field(node) or self._is_in_table(node):
                yield node.lineno, f"the literal {text!r}"
        elif text in self.kind.names:
            yield node.lineno, f"the literal {text!r}"
        elif found := self.in_text.search(text):
            yield node.lineno, f"{found[0]!r} in the text {text!r}"
        elif any(f"{self.package}.{module}" in text for module in self.kind.modules):
            yield node.lineno, f"the module {text!r}"

    def _in_import(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[int, str]]:
        for alias in node.names:
            if isinstance(node, ast.Import):
                whole = alias.name
            else:
                whole = f"{node.module or ''}.{alias.name}"
                if alias.name in self.kind.classes:
                    yield node.lineno, f"imports the class {alias.name}"
            # a relative import leaves out the front of the name
            tail = whole.removeprefix(self.package + ".") if self.package in whole else None
            if isinstance(node, ast.ImportFrom) and node.level:
                tail = f".{whole}".rpartition(f".{self.kind.folder.rpartition('/')[2]}.")[2]
            if tail is not None and tail.split(".")[0] in self.kind.modules:
                yield node.lineno, f"imports {whole}"

    def _is_beside_field(self, node: ast.AST) -> bool:
        """Return whether what a word is compared with, is chosen by or goes into is a field."""
        child, parent = node, self.parents.get(node)
        while parent is not None:
            if isinstance(parent, ast.Compare):
                return any(self._speaks(side) for side in ast.iter_child_nodes(parent))
            if isinstance(parent, ast.keyword):
                return self._has_field(parent.arg or "")
            if isinstance(parent, ast.Assign | ast.AnnAssign | ast.NamedExpr):
                targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
                return any(self._speaks(target) for target in targets)
            if isinstance(parent, ast.match_case):
                match = self.parents[parent]
                assert isinstance(match, ast.Match)
                return self._speaks(match.subject)
            if isinstance(parent, ast.Dict):
                used = self.parents.get(parent)
                place = next((i for i, value in enumerate(parent.values) if value is child), None)
                key = parent.keys[place] if place is not None else None
                if key is not None and self._speaks(key):
                    return True
                return (
                    child in parent.keys and used is not None and self._speaks(used, without=parent)
                )
            if isinstance(parent, ast.Subscript) and ast.unparse(parent.value) != "Literal":
                return self._speaks(parent.value)
            if isinstance(parent, ast.arguments):
                return any(self._has_field(each.arg) for each in self._defaulted(parent, child))
            if isinstance(parent, ast.Call):
                # of a method of what is asked for: `suite.task.startswith("choice")`
                return child is not parent.func and self._speaks(parent.func)
            if isinstance(parent, ast.stmt):
                return False
            child, parent = parent, self.parents.get(parent)
        return False

    def _defaulted(self, arguments: ast.arguments, default: ast.AST) -> list[ast.arg]:
        places = [*arguments.posonlyargs, *arguments.args]
        pairs = [*zip(reversed(places), reversed(arguments.defaults), strict=False)]
        pairs += [
            (arg, value)
            for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            if value is not None
        ]
        return [arg for arg, value in pairs if value is default]

    def _is_in_table(self, node: ast.Constant) -> bool:
        """Return whether a word stands in one literal collection with another name of the kind."""
        parent = self.parents.get(node)
        if not isinstance(parent, ast.Dict | ast.Set | ast.Tuple | ast.List):
            return False
        beside = parent.keys if isinstance(parent, ast.Dict) else parent.elts
        found = {
            each.value
            for each in beside
            if isinstance(each, ast.Constant) and each.value in self.kind.names
        }
        return node in beside and len(found) > 1

    def _speaks(
        self, node: ast.AST, of: tuple[str, ...] | None = None, *, without: ast.AST | None = None
    ) -> bool:
        """Return whether one of the identifiers or keys of an expression is a field."""
        left = [node]
        while left:
            each = left.pop()
            if each is without:
                continue
            name = getattr(each, "id", None) or getattr(each, "attr", None)
            if isinstance(each, ast.Constant) and isinstance(each.value, str):
                name = each.value if each.value.isidentifier() else None
            if isinstance(name, str) and self._has_field(name, of):
                return True
            left += ast.iter_child_nodes(each)
        return False

    def _has_field(self, identifier: str, of: tuple[str, ...] | None = None) -> bool:
        parts = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", identifier).lower().split("_")
        return any(part in (self.kind.fields if of is None else of) for part in parts)


def _any_of(names: Iterable[str]) -> str:
    """Return a pattern of these names; of none, one that nothing matches."""
    return "|".join(map(re.escape, sorted(names))) or r"(?!)"
