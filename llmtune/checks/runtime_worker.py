"""The process in which llama.cpp runs: reads questions from one JSON file, answers into another."""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, TypedDict

import xllamacpp

GREEDY = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False}
STOPPED = "eos"
LETTER = "a"
PREFERENCE = 1e4  # added to a logit
FEW_PROBABILITIES = 64  # the whole vocabulary is megabytes of JSON a question
LEAST_LIKELY = -1e9


class Answer(TypedDict):
    """What was written after a prompt, up to the token that ends it."""

    token_ids: list[int]
    stopped: bool
    margins: list[float | None]
    """Log-probability of each token less that of the second likeliest."""


class ChatAnswer(Answer):
    """The answer to a conversation, and the prompt that the file's template made of it."""

    prompt_ids: list[int]


class Server:
    """llama.cpp's own server with one file loaded, asked over the loopback interface."""

    def __init__(self, question: dict[str, Any]) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = question["path"]
        params.n_ctx = question["context_length"]
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.hostnames = ["127.0.0.1"]
        params.cpuparams.n_threads = question["num_threads"]
        params.cpuparams_batch.n_threads = question["num_threads"]
        if question["lora"]:
            adapter = xllamacpp.CommonAdapterLoraInfo(question["lora"], 1.0)
            params.lora_adapters = [adapter]
        self._server = xllamacpp.Server(params)
        # straight to the loopback address, whatever proxy the environment names
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send one JSON request and return the JSON answer."""
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with self._opener.open(request) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Return the ids of a text in which special tokens are recognized."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self.post("/tokenize", body)["tokens"])

    def answer_chat(self, messages: list[dict[str, str]], max_new_tokens: int) -> "ChatAnswer":
        """Render a conversation with the file's template, and answer it as the chat does."""
        prompt = self.post("/apply-template", {"messages": messages})["prompt"]
        ids = self.tokenize(prompt, add_special=True)
        return {"prompt_ids": ids, **self.answer(prompt, max_new_tokens)}

    def answer(self, prompt: str | list[int], max_new_tokens: int) -> "Answer":
        """Continue a text or token ids greedily."""
        body = {"prompt": prompt, "n_predict": max_new_tokens, "n_probs": 2, "return_tokens": True}
        reply = self.post("/completion", {**GREEDY, **body})
        ids = reply["tokens"]
        margins = _align(ids, reply.get("completion_probabilities", []))
        stopped = reply["stop_type"] == STOPPED
        kept = len(ids) - 1 if stopped else len(ids)  # the last one is the end of text
        return {"token_ids": ids[:kept], "stopped": stopped, "margins": margins[:kept]}

    def rate(self, prompt: list[int], candidates: list[int], vocabulary: int) -> list[float]:
        """Return the log-probability of every candidate after `prompt`."""
        for count in (FEW_PROBABILITIES, vocabulary):
            # the prompts of a suite begin alike: llama.cpp keeps what it computed of that
            found = self.next_token(prompt, count, keeps_prefix=True)
            if all(id in found for id in candidates):
                break
        return [found.get(id, LEAST_LIKELY) for id in candidates]

    def next_token(
        self, prompt: list[int], count: int, *, keeps_prefix: bool = False
    ) -> dict[int, float]:
        """Return the log-probabilities of the `count` likeliest tokens after `prompt`.

        The server sends no probabilities beside an end of text or half a character, so the token
        it takes is a letter; the probabilities are those before that preference.
        """
        letter = self.tokenize(LETTER, add_special=False)[-1]
        body = {"prompt": prompt, "n_predict": 1, "n_probs": count}
        body["logit_bias"] = [[letter, PREFERENCE]]
        reply = self.post("/completion", {**GREEDY, **body, "cache_prompt": keeps_prefix})
        top = reply["completion_probabilities"][0]["top_logprobs"]
        return {one["id"]: one["logprob"] for one in top}


def main(question_path: str, answer_path: str) -> None:
    """Answer the questions in one file into the other."""
    question = json.loads(Path(question_path).read_text(encoding="utf-8"))
    server = Server(question)
    vocabulary = 1 << 20  # more than any; the server gives as many as there are
    answers = {
        "text_ids": [server.tokenize(text, add_special=False) for text in question["texts"]],
        "answers": [
            server.answer_chat(messages, question["max_new_tokens"])
            for messages in question["conversations"]
        ]
        + [
            {"prompt_ids": ids, **server.answer(ids, question["max_new_tokens"])}
            for ids in question["continued"]
        ],
        "distributions": [server.next_token(ids, vocabulary) for ids in question["prompts"]],
        "candidates": [server.rate(ids, some, vocabulary) for ids, some in question["candidates"]],
    }
    Path(answer_path).write_text(json.dumps(answers), encoding="utf-8")


def _align(ids: list[int], steps: list[dict[str, Any]]) -> list[float | None]:
    """Return each token's margin; the server leaves out tokens that are half a character."""
    margins: list[float | None] = []
    left = iter(steps)
    step = next(left, None)
    for id in ids:
        if step is not None and step["id"] == id:
            margins.append(_margin(step["top_logprobs"]))
            step = next(left, None)
        else:
            margins.append(None)
    return margins


def _margin(top: list[dict[str, Any]]) -> float:
    return top[0]["logprob"] - top[1]["logprob"] if len(top) > 1 else 0.0


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except urllib.error.HTTPError as failed:
        sys.exit(f"{failed.url}: {failed} {failed.read().decode(errors='replace')}")
