"""The base model: found, loaded, quantized and described. The only room that loads bitsandbytes."""

import logging


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Drop one line: on importing, bitsandbytes names a CPU kernel package it does not need."""
    return "kernels-community" not in record.getMessage()


# peft and trl import bitsandbytes too, so this stands where every engine passes before them.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_worth_showing)
