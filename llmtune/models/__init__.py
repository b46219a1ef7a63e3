"""The base model: found, loaded, quantized and described. The only room that loads bitsandbytes."""

import logging

# On import it names a CPU kernel package it does without; with int8 it says once per layer and
# step that inputs become float16 (`load_model` says so once).
UNWANTED = ("kernels-community", "MatMul8bitLt: inputs will be cast")
LOGGERS = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in UNWANTED)


# peft and trl import bitsandbytes too, so this is done where every engine passes before them.
for _name in LOGGERS:
    logging.getLogger(_name).addFilter(_is_worth_showing)
