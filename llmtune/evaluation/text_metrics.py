"""Metrics of longer written answers: overlap of texts, agreement of JSON, and the user's own."""

import hashlib
import importlib
import inspect
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_text
from llmtune.io.json_files import parse_json
from llmtune.io.stopping import limited_work

TextMetric = Callable[[str, str], float]
OWN_METRIC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""A function of the user's: `my_module:function`."""
FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
NOT_JSON = ("NaN", "Infinity", "-Infinity")
"""Python reads these as numbers; JSON has none of them."""
DEEPEST = 200
"""Levels that an answer in JSON may have."""
MATCHING_SECONDS = 2.0
"""Of the processor, to match one answer with a pattern; usual ones take microseconds."""
NEEDS_EXTRA = "needs two more packages: pip install sacrebleu rouge-score"


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), in lower case."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise LlmtuneError(f"metric: rouge_l {NEEDS_EXTRA}") from None
    found = RougeScorer(["rougeL"], tokenizer=_Words()).score(reference, prediction)
    return float(found["rougeL"].fmeasure)


def bleu(prediction: str, reference: str) -> float:
    """Sentence BLEU from 0 to 1, smoothed as sacrebleu does."""
    return float(_sacrebleu("bleu").sentence_bleu(prediction, [reference]).score) / 100


def chrf(prediction: str, reference: str) -> float:
    """F-score of character n-grams (chrF2, Popovic 2015) from 0 to 1."""
    return float(_sacrebleu("chrf").sentence_chrf(prediction, [reference]).score) / 100


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all answers together from 0 to 1: the number that papers give."""
    found = _sacrebleu("bleu").corpus_bleu(list(predictions), [list(references)])
    return float(found.score) / 100


def json_valid(prediction: str, reference: str) -> float:
    """1 if the text is JSON, in a code fence or not."""
    return float(_read_json(prediction) is not None)


def json_match(prediction: str, reference: str) -> float:
    """1 where both are the same JSON; the order of keys does not count."""
    found = _read_json(prediction)
    expected = _read_json(reference)
    if found is None or expected is None:
        return 0.0
    return float(Counter(_leaves(found[0])) == Counter(_leaves(expected[0])))


def json_fields(prediction: str, reference: str) -> float:
    """F1 of the fields: pairs of a path and its value, in both; 0 for what is not JSON."""
    found, expected = _read_json(prediction), _read_json(reference)
    if found is None or expected is None:
        return 0.0
    written, right = (Counter(_leaves(value[0])) for value in (found, expected))
    shared = sum((written & right).values())
    total = sum(written.values()) + sum(right.values())
    return 2 * shared / total if total else 1.0


def load_schema_metric(schema: Mapping[str, Any]) -> TextMetric:
    """Return the metric that is 1 if the text is JSON that a JSON Schema allows.

    A `$ref` to elsewhere is never fetched.

    Raises:
        LlmtuneError: `jsonschema` is not installed, or (also when called) the schema is not one.
    """
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise LlmtuneError(
            "metric: json_schema needs one more package: pip install jsonschema (the extra metrics)"
        ) from None
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise LlmtuneError(f"answer_schema: is not a JSON Schema: {error.message}") from None
    validator = kind(schema, registry=Registry())

    def json_schema(prediction: str, reference: str) -> float:
        found = _read_json(prediction)
        try:
            with limited_work(MATCHING_SECONDS, "answer_schema: comparing an answer with it"):
                return float(found is not None and validator.is_valid(found[0]))
        except Unresolvable as error:
            raise LlmtuneError(f"answer_schema: a reference leads nowhere: {error}") from None

    return json_schema


TEXT_METRICS: dict[str, TextMetric] = {
    "rouge_l": rouge_l,
    "bleu": bleu,
    "chrf": chrf,
    "json_valid": json_valid,
    "json_match": json_match,
    "json_fields": json_fields,
}
"""What an item scores, by metric: the text as it was written against one reference."""


def load_own_metric(name: str) -> TextMetric:
    """Return the user's function `my_module:function`; the current directory is looked in, too.

    It takes the written text and one reference, and returns a finite number; more is better.

    Raises:
        LlmtuneError: it cannot be imported, is not a function, or (when called) fails or returns
            something else than a finite number.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise LlmtuneError(f"metric: {name}: cannot be imported: {error}") from None
    if not callable(function):
        raise LlmtuneError(f"metric: {name}: is {type(function).__name__}, expected a function")

    def checked(prediction: str, reference: str) -> float:
        try:
            value = function(prediction, reference)
        except Exception as error:  # the user's code may raise anything
            raise LlmtuneError(
                f"metric: {name}: failed on {prediction!r} against {reference!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise LlmtuneError(f"metric: {name}: returned {value!r}; expected a finite number")
        return float(value)

    return checked


def fingerprint_own_metric(name: str) -> str:
    """Return a hash of the file that the user's function is in, so that changes are noticed.

    A notebook's functions are in no file: the hash is of the function alone. In a script the whole
    file counts, too, since the function may call others there.
    """
    load_own_metric(name)
    module, _, attribute = name.partition(":")
    file = getattr(sys.modules[module], "__file__", None)
    if file and (module != "__main__" or Path(file).is_file()):
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    function = getattr(sys.modules[module], attribute)
    try:
        return hash_text(inspect.getsource(function))
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return hash_text(_render_code(code) if code else name)


def _render_code(value: object) -> str:
    """Return what a function does as text that is the same in every process."""
    if isinstance(value, CodeType):
        constants = ", ".join(map(_render_code, value.co_consts))
        return f"({value.co_code!r}, ({constants}), {value.co_names!r})"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(repr, value)))}}}"
    return repr(value)


class _Words:
    """Words of any script, in lower case (rouge_score's own tokenizer drops all but ASCII)."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _sacrebleu(metric: str) -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise LlmtuneError(f"metric: {metric} {NEEDS_EXTRA}") from None
    return sacrebleu


def _read_json(text: str) -> tuple[Any] | None:
    """Return the value in a tuple, since `null` is a value, too; None if it is not JSON."""
    fenced = FENCE.match(text)
    try:
        value = parse_json(fenced.group(1) if fenced else text)
        is_json = all(leaf not in NOT_JSON for _, leaf in _leaves(value))
    except ValueError:
        return None
    return (value,) if is_json else None


def _leaves(
    value: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield each value that holds no other, with the keys and places that lead to it.

    1 and 1.0 are one number in JSON, and `true` is not a number.

    Raises:
        ValueError: it is nested too deeply.
    """
    if len(path) > DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(value, list) and value:
        for place, child in enumerate(value):
            yield from _leaves(child, (*path, place))
    elif isinstance(value, float) and value.is_integer():
        yield path, json.dumps(int(value))
    else:
        yield path, json.dumps(value)
