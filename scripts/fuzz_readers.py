"""Mutate small valid files and give each to its reader, in a process with little memory and time.

    python scripts/fuzz_readers.py --reader gguf --minutes 10
    python scripts/fuzz_readers.py --seed 7 --cases 200        every reader, the same 200 cases each

A reader may accept what it is given, or refuse it with one LlmtuneError. Anything else is a
finding: a different exception, a process that dies, more than the memory, longer than the time.
Every finding is printed with its case's number; --reader R --seed S --first N makes it again.
Exit code 1 if there are findings.
"""

import argparse
import contextlib
import copy
import json
import logging
import math
import os
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MEMORY_BYTES = 1 << 30
"""More than a process has after its first valid case."""
CASE_SECONDS = 20
START_SECONDS = 60
PATIENCE = 20
"""How many times its own time a process may wait for the processor."""
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        5,
        0.5,
        -0.0,
        math.inf,
        math.nan,
        2**31,
        2**63,
        -(2**63),
        10**30,
    ),
    *(
        "",
        "x",
        "../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "x" * 5000,
        "null",
        "([a-z.]+)+!",
        "{{ x }}",
    ),
    *([], {}, [[]], [5], ["x"], {"x": 5}, [None], [10**9], {"weight_map": {}}),
)
NUMBERS = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
SNIPPETS = (
    *("{% for a in range(99999) %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{{ x ~ x }}"),
    *("{{ 'a' * 10**9 }}", "{{ '%99999999d' % 1 }}", "{% set x = [x, x] %}", "{{ messages }}"),
    *("{% set ns = namespace(x='aa') %}", "{% set ns.x = ns.x + ns.x %}", "{{ ns.x }}", "{#", "#}"),
    *("|tojson", "|join('aaaa')", "|center(10**9)", "|replace('', 'aaaa')", ".format(*messages)"),
    *("{{ messages[0].content.ljust(10**9) }}", "loop.index", "[::-1]", "**", "~", "(", ")", "]"),
    *("{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}", "{{ m(1) }}", "{% generation %}"),
    *("{% endgeneration %}", "{{ raise_exception('no') }}", "{% break %}", "{{ 10**10**10 }}"),
    *("{% include 'x' %}", "{% call m(1) %}", "{% endcall %}", "{{ loop(messages) }}", "recursive"),
    *("{{ x.__class__ }}", "{{ messages|map('upper')|list }}", "{% set x %}", "{% endset %}", "-"),
)


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Change, drop, double or cut some bytes."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(found) + 1)
        match draw.randrange(6):
            case 0 if found:
                found[at % len(found)] ^= 1 << draw.randrange(8)
            case 1:
                number = draw.choice(NUMBERS)
                found[at : at + 8] = struct.pack("<Q", number)
            case 2:
                found[at : at + draw.choice((1, 8, 100))] = b""
            case 3:
                found[at:at] = found[draw.randrange(len(found) + 1) :][: draw.choice((1, 8, 100))]
            case 4:
                found[at:at] = draw.randbytes(draw.choice((1, 4, 8)))
            case 5 if draw.random() < 0.2:
                del found[at:]
    return bytes(found)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """Replace, drop or double values in a tree."""
    tree = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 5))):
        places = list(_places(tree))
        if not places:
            return draw.choice(VALUES)
        owner, key = draw.choice(places)
        match draw.randrange(5):
            case 0 | 1:
                owner[key] = copy.deepcopy(draw.choice(VALUES))
            case 2:
                del owner[key]
            case 3:
                other, name = draw.choice(places)
                owner[key] = copy.deepcopy(other[name])
            case _:
                number = owner[key]
                if type(number) is int:
                    owner[key] = draw.choice((-number, number + 1, number * 10**6, str(number)))
    return draw.choice(VALUES) if draw.random() < 0.02 else tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(places) < 5000:
        one = waiting.pop()
        keys = (
            list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        )
        places += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return places


def as_json(value: Any) -> bytes:
    """Return a tree as the bytes of a JSON file."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_json_bytes(content: bytes, draw: random.Random) -> bytes:
    """Mutate the tree of a JSON file mostly, else its bytes."""
    if draw.random() < 0.2:
        return mutate_bytes(content, draw)
    return as_json(mutate_json(json.loads(content), draw))


def mutate_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Mutate the tree of the header mostly, else the bytes."""
    if draw.random() < 0.3:
        return mutate_bytes(content, draw)
    size = int.from_bytes(content[:8], "little")
    header = as_json(mutate_json(json.loads(content[8 : 8 + size]), draw))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def mutate_template(content: bytes, draw: random.Random) -> bytes:
    """Put pieces of the language into a template, or take some out."""
    text = content.decode()
    for _ in range(draw.choice((1, 2, 4, 8))):
        at = draw.randrange(len(text) + 1)
        if draw.random() < 0.75:
            text = text[:at] + draw.choice(SNIPPETS) + text[at:]
        else:
            text = text[:at] + text[at + draw.choice((1, 3, 10)) :]
    return text.encode()


Mutation = Callable[[bytes, random.Random], bytes]


@dataclass
class Reader:
    """A reader with the valid files it reads, one of which is mutated at a time."""

    make: Callable[[Path], None]
    """Writes the valid files into a directory."""
    read: Callable[[Path], object]
    """Reads the directory as a command does."""
    mutations: dict[str, Mutation]
    """By file name."""


def make_checkpoint(directory: Path) -> None:
    """A tiny model with its tokenizer."""
    from tests.tiny import make_model

    make_model("llama", directory)


def make_sharded(directory: Path) -> None:
    """Two shards and their index."""
    from llmtune.io.safetensors import build_preamble

    weight_map = {}
    for name in ("a", "b"):
        file_name = f"model-{name}.safetensors"
        preamble = build_preamble([(f"{name}.weight", "F32", (4, 4))], {"format": "pt"})
        (directory / file_name).write_bytes(preamble + bytes(64))
        weight_map[f"{name}.weight"] = file_name
    index = {"metadata": {"total_size": 128}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def make_gguf(directory: Path) -> None:
    """A head with every type of value, arrays of both kinds, and two tensors."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    sizes = {"embedding_length": 8, "block_count": 2, "feed_forward_length": 16}
    for key, size in {**sizes, "attention.head_count": 2, "attention.head_count_kv": 1}.items():
        pairs.append(text(f"llama.{key}") + struct.pack("<II", 4, size))
    pairs.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") * 2)
    for number, kind in enumerate("BbHhIif?"):
        pairs.append(text(f"k.{number}") + struct.pack(f"<I{kind}", number, 1))
    pairs.append(text("k.texts") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("bc") + text(""))
    pairs.append(text("k.numbers") + struct.pack("<IIQ", 9, 4, 4) + bytes(16))
    tensors = [text(f"blk.0.w{n}") + struct.pack("<IQQIQ", 2, 8, 4, 0, n * 128) for n in range(2)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    content = head + b"".join(pairs) + b"".join(tensors)
    (directory / "model.gguf").write_bytes(content + bytes(-len(content) % 32 + 256))


def make_adapter(directory: Path) -> None:
    """An adapter's config, manifest and weights."""
    from llmtune.io.safetensors import build_preamble

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = [(f"{name}A.weight", "F32", (2, 8)), (f"{name}B.weight", "F32", (8, 2))]
    (directory / "adapter_model.safetensors").write_bytes(build_preamble(tensors, {}) + bytes(128))
    config = {
        "peft_type": "LORA",
        **{"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"},
        **{
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.0.q_proj": 2},
            "alpha_pattern": {},
        },
        **{"modules_to_save": None, "use_rslora": False, "use_dora": False, "inference_mode": True},
        **{"base_model_name_or_path": "base", "revision": None, "exclude_modules": None},
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    manifest = {"format": 1, "base": {"fingerprint": "0" * 64, "origin": "x"}, "files": {}}
    (directory / "llmtune_adapter.json").write_text(json.dumps(manifest))


def make_manifest(directory: Path) -> None:
    """A run's manifest."""
    stage = {"fingerprint": "0", "inputs": {"a": 1}, "started": "2026", "result": {"steps": 2}}
    value = {
        **{"format": 1, "config": {"model": {"base": "b"}}, "created": "2026", "machine": {}},
        **{"versions": {}, "base": {"origin": "b"}, "data": {}, "stages": {"train": stage}},
    }
    (directory / "manifest.json").write_text(json.dumps(value))


def make_template(directory: Path) -> None:
    """A tokenizer whose template is a file."""
    from tests.tiny import CHATML, make_tokenizer

    make_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(CHATML)


def read_json(directory: Path) -> object:
    """Read one JSON object."""
    from llmtune.io.json_files import read_json_object

    return read_json_object(directory / "manifest.json")


def read_manifest(directory: Path) -> object:
    """Read a run's manifest as every command on a run does."""
    from llmtune.io import manifest
    from llmtune.io.run_dir import RunDir
    from llmtune.runs.listing import list_runs

    list_runs(directory.parent)
    return manifest.read_manifest(RunDir(directory)).trained


def read_index(directory: Path) -> object:
    """Open a checkpoint and hash it."""
    from llmtune.io.safetensors import CheckpointIndex, fingerprint_checkpoint

    return fingerprint_checkpoint(CheckpointIndex.open(directory))


def read_gguf(directory: Path) -> object:
    """Read the head as plan does."""
    from llmtune.planning.base import read_gguf_config
    from llmtune.planning.shape import read_shape

    return read_shape(read_gguf_config(directory / "model.gguf"), "model.gguf").num_parameters


def read_adapter(directory: Path) -> object:
    """Check an adapter and sort its tensors, as merging does."""
    from llmtune.adapters.manifest import check_adapter, has_effect, has_strengths
    from llmtune.merging.adapter_files import AdapterFiles

    check_adapter(directory, base_fingerprint=None)
    files = AdapterFiles.open(directory)
    for module in files.modules:
        if not files.beside_factors():
            files.factors(module)
    return has_effect(directory), has_strengths(directory)


def read_config(directory: Path) -> object:
    """Open a checkpoint and build its skeleton."""
    from llmtune.models.checkpoint import Checkpoint
    from llmtune.models.skeleton import build_skeleton
    from llmtune.planning.shape import read_shape

    source = Checkpoint.open(directory)
    source.require_whole(allow_pickle=False)
    read_shape(source.config, "config.json")
    return build_skeleton(source), source.num_embedding_rows, source.num_positions


def read_tokenizer(directory: Path) -> object:
    """Load a checkpoint's tokenizer, with what ends its answers."""
    from llmtune.models.checkpoint import Checkpoint

    source = Checkpoint.open(directory)
    return source.tokenizer, source.stop_token_ids


def read_template(directory: Path) -> object:
    """Render a chat as training does."""
    from llmtune.data.render import render_messages
    from llmtune.models.tokenizer import load_tokenizer
    from llmtune.models.turns import find_turn_ending

    tokenizer = load_tokenizer(
        directory, num_rows=1 << 20, config={"eos_token_id": 3}, generation_config={}
    )
    find_turn_ending(tokenizer)
    return render_messages(tokenizer, [{"role": "user", "content": "Why is the sky blue?"}])


READERS = {
    "json": Reader(make_manifest, read_json, {"manifest.json": mutate_bytes}),
    "manifest": Reader(make_manifest, read_manifest, {"manifest.json": mutate_json_bytes}),
    "index": Reader(make_sharded, read_index, {"model.safetensors.index.json": mutate_json_bytes}),
    "safetensors": Reader(make_sharded, read_index, {"model-a.safetensors": mutate_safetensors}),
    "gguf": Reader(make_gguf, read_gguf, {"model.gguf": mutate_bytes}),
    "adapter": Reader(
        make_adapter,
        read_adapter,
        {
            "adapter_config.json": mutate_json_bytes,
            "llmtune_adapter.json": mutate_json_bytes,
            "adapter_model.safetensors": mutate_safetensors,
        },
    ),
    "adapter_config": Reader(
        make_adapter, read_adapter, {"adapter_config.json": mutate_json_bytes}
    ),
    "config": Reader(make_checkpoint, read_config, {"config.json": mutate_json_bytes}),
    "tokenizer": Reader(
        make_checkpoint,
        read_tokenizer,
        {
            "tokenizer.json": mutate_json_bytes,
            "tokenizer_config.json": mutate_json_bytes,
            "generation_config.json": mutate_json_bytes,
        },
    ),
    "generation": Reader(
        make_checkpoint, read_tokenizer, {"generation_config.json": mutate_json_bytes}
    ),
    "template": Reader(make_template, read_template, {"chat_template.jinja": mutate_template}),
}
LIGHT = ("json", "manifest", "index", "safetensors", "gguf", "adapter", "adapter_config")
"""Readers that load no torch."""


def work(name: str, seed: int, first: int) -> None:
    """Run cases from `first` on, until killed; a line on standard output before and after each."""
    from llmtune.errors import LlmtuneError

    reader = READERS[name]
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "files"
        directory.mkdir()
        reader.make(directory)
        originals = {path.name: path.read_bytes() for path in directory.iterdir()}
        reader.read(directory)  # the valid files are read, and what is imported late is
        used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES,) * 2)
        print("ready", flush=True)
        for case in range(first, sys.maxsize):
            draw = random.Random(f"{seed}/{name}/{case}")
            file_name = draw.choice(sorted(reader.mutations))
            mutated = reader.mutations[file_name](originals[file_name], draw)
            (directory / file_name).write_bytes(mutated)
            print(f"case {case}", flush=True)
            outcome = "accepted"
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    reader.read(directory)
            except LlmtuneError:
                outcome = "refused"
            except BaseException as error:  # noqa: BLE001 (that is the question)
                last = traceback.extract_tb(error.__traceback__)[-1]
                inner = [
                    f for f in traceback.extract_tb(error.__traceback__) if "llmtune" in f.filename
                ]
                place = f"{Path(inner[-1].filename).name}:{inner[-1].lineno}" if inner else "?"
                outcome = f"{type(error).__name__} in {place} ({Path(last.filename).name}): {error}"
            (directory / file_name).write_bytes(originals[file_name])
            print("done " + " ".join(outcome.split())[:400], flush=True)


@dataclass
class Result:
    """What a reader did with its cases."""

    cases: int = 0
    accepted: int = 0
    seconds: float = 0.0
    findings: dict[str, list[int]] = field(default_factory=dict)


def fuzz(name: str, *, seed: int, first: int, seconds: float, most_cases: int) -> Result:
    """Give a reader its cases until the time or the number of cases is over."""
    result, case, began = Result(), first, time.monotonic()
    process: subprocess.Popen[bytes] | None = None
    while time.monotonic() - began < seconds and result.cases < most_cases:
        if process is None:
            process = _start(name, seed, case)
            if (line := _line(process, START_SECONDS)) != "ready":
                process.kill()
                raise SystemExit(f"{name}: its process does not start: {line}")
        said = _line(process, CASE_SECONDS)
        if said.startswith("case "):
            case = int(said.split()[1])
            said = _line(process, CASE_SECONDS)
        result.cases += 1
        outcome = said.removeprefix("done ")
        result.accepted += outcome == "accepted"
        if outcome not in ("accepted", "refused"):
            result.findings.setdefault(outcome, []).append(case)
        if not said.startswith("done "):
            process.kill()
            process.wait()
            process, case = None, case + 1
    if process is not None:
        process.kill()
        process.wait()
    result.seconds = time.monotonic() - began
    return result


def _start(name: str, seed: int, first: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--work", "--reader", name]
    return subprocess.Popen(
        [*command, "--seed", str(seed), "--first", str(first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,  # `select` must see every line that was not read
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def _line(process: "subprocess.Popen[bytes]", seconds: float) -> str:
    """Return the next line; what happened instead, if none comes in so much of its own time."""
    assert process.stdout is not None
    began, used = time.monotonic(), _own_seconds(process)
    while not select.select([process.stdout], [], [], 1.0)[0]:
        waited = time.monotonic() - began
        if _own_seconds(process) - used > seconds or waited > PATIENCE * seconds:
            return f"hangs for {seconds:.0f} s"
    line = process.stdout.readline().decode().strip()
    return line or f"dies with exit code {process.wait()}"


def _own_seconds(process: "subprocess.Popen[bytes]") -> float:
    """Return the processor time that a process has used: a busy machine is not a hang."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def main(arguments: list[str] | None = None) -> int:
    """Run the readers that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--reader", choices=[*READERS, "light", "all"], default="all")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each reader")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="for each reader, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.reader, options.seed, options.first)
    groups = {"all": tuple(READERS), "light": LIGHT}
    failed = False
    for name in groups.get(options.reader, (options.reader,)):
        result = fuzz(
            name,
            seed=options.seed,
            first=options.first,
            seconds=60 * options.minutes,
            most_cases=options.cases,
        )
        print(
            f"{name}: {result.cases:,} cases in {result.seconds / 60:.1f} minutes, "
            f"{result.accepted:,} accepted, {len(result.findings)} findings",
            flush=True,
        )
        for outcome, cases in result.findings.items():
            print(f"  {len(cases)} times, first case {cases[0]}: {outcome}", flush=True)
        failed |= bool(result.findings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
