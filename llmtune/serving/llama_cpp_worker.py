"""The process in which llama.cpp serves one file, until its input ends or it is terminated."""

import os
import sys
from typing import Any

import xllamacpp

from llmtune.io.json_files import parse_json
from llmtune.serving.llama_cpp import KEY_VARIABLE

ERRORS_ONLY = 1


def start_server(question: dict[str, Any], port: int, key: str | None) -> xllamacpp.Server:
    """Start llama.cpp's own server.

    Its samplers that the protocol does not know (top-k, min-p) are off unless a request asks for
    them, so that temperature and top-p mean what they mean elsewhere.
    """
    params = xllamacpp.CommonParams()
    params.model.path = question["path"]
    if question["template"] is not None:
        params.chat_template = question["template"]
    params.model_alias = {question["name"]}
    params.hostnames = [question["host"]]
    params.port = port
    params.api_keys = [key] if key else []
    params.n_ctx = 0  # as the file says
    params.ui = False
    params.endpoint_slots = False  # it shows what others ask
    params.cors_origins = ""  # no page of a browser may read answers
    params.verbosity = ERRORS_ONLY
    params.sampling.temp = question["temperature"]
    params.sampling.top_k = 0
    params.sampling.top_p = 1.0
    params.sampling.min_p = 0.0
    return xllamacpp.Server(params)


def main(question: str, port: str) -> None:
    """Serve until whoever started this process ends."""
    server = start_server(parse_json(question), int(port), os.environ.get(KEY_VARIABLE))
    sys.stdin.buffer.read()
    del server


if __name__ == "__main__":
    main(*sys.argv[1:])
