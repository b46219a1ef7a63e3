"""What `verify` found, in words for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

QUESTIONS = {
    "merged model": "the file in llama.cpp against the merged model it was made from: is the file "
    "right?",
    "model": "the file in llama.cpp against the model: is the file right?",
    "live adapter": "the file in llama.cpp against base + adapter: do merge and file together "
    "answer as what was trained?",
}


def describe_verification(result: Mapping[str, Any]) -> str:
    """Return every comparison with its limit, and the verdict."""
    if "file" in result:
        lines = [f"{result['subject']} ({result['type']})"]
        for compared in (result["file"], result["chain"]):
            if compared is not None:
                lines += [QUESTIONS[compared["against"]], *_file_lines(compared)]
    else:
        lines = [f"{result['subject']}", *_directory_lines(result)]
    if result["problems"]:
        lines.append(f"FAILED: {len(result['problems'])} of these are beyond their limit")
    else:
        lines.append(f"passed: the same as {result['against']} within these limits")
    return "\n".join(lines)


def _file_lines(compared: Mapping[str, Any]) -> Iterator[str]:
    yield _line(
        "chat prompts, same token ids",
        f"{compared['num_same_prompts']} of {compared['num_prompts']}",
        "all of them",
    )
    yield _line(
        "KL after a prompt", f"{compared['kl']:.2g} nats", f"at most {compared['max_kl']:g}"
    )
    for one in compared["labels"]:
        yield _line(
            f"label accuracy, {one['suite']}",
            f"{100 * one['file_accuracy']:.1f} % (model {100 * one['model_accuracy']:.1f} %), "
            f"{one['num_same']} of {one['n']} labels the same",
            f"at most {100 * compared['max_accuracy_change']:g} points apart",
        )
    yield _line("greedy answers the same", _answers(compared), "shown, not judged")
    yield _strings(compared)


def _answers(compared: Mapping[str, Any]) -> str:
    text = f"{compared['num_same_answers']} of {compared['num_prompts']}"
    margins = sorted(one["margin"] for one in compared["differences"])
    if margins:
        text += f"; the others part where the first token led by {margins[0]:.3f}"
        text += f" to {margins[-1]:.3f} nats" if len(margins) > 1 else " nats"
    return text


def _directory_lines(result: Mapping[str, Any]) -> Iterator[str]:
    base = "quantized base" if result["live_is_quantized"] else "base"
    strength = result["strength"]
    at = "" if strength == 1 else f" at strength {strength:g}"
    yield f"the model from disk against the live {base} + adapter{at}, both in {result['dtype']}"
    yield _line("KL", f"{result['kl']:.2g} nats/token", f"at most {result['max_kl']:g}")
    yield _line("top-1 agreement", f"{result['top1_agreement']:.2%}", "shown, not judged")
    yield _line(
        "greedy answers the same",
        f"{result['num_same_texts']} of {result['num_open_prompts']}",
        "shown, not judged",
    )
    yield _line(
        "chat prompts, same token ids",
        f"{result['num_same_prompts']} of {result['num_prompts']}",
        "all of them",
    )
    yield _strings(result)


def _strings(result: Mapping[str, Any]) -> str:
    return _line(
        "tricky strings, same tokens",
        f"{result['num_same_strings']} of {result['num_strings']}",
        "all of them",
    )


def _line(what: str, found: str, limit: str) -> str:
    return f"  {what:<30}{found}  [{limit}]"
