"""Adapters: their knobs, attaching them to a base, keeping them on disk. Owns the use of peft."""

import llmtune.models as _models  # noqa: F401  (quiets bitsandbytes before peft imports it)
