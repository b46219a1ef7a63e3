"""Which base this is: one fingerprint of its weights, so that an adapter can know its own."""

from pathlib import Path

from llmtune.io.fingerprint import hash_file, hash_json
from llmtune.io.safetensors import fingerprint_checkpoint
from llmtune.models.checkpoint import SAFETENSORS_NAMES, has_weights


def base_fingerprint(base_dir: Path) -> str:
    """Return the fingerprint of a checkpoint's weights, 64 hex digits. Loads no torch.

    Names, shapes, dtypes and sampled bytes of every tensor for safetensors; all bytes for pickled
    weights. Neither the directory's name nor the sharding counts.
    """
    if has_weights(base_dir, SAFETENSORS_NAMES):
        return fingerprint_checkpoint(base_dir)
    return hash_json({path.name: hash_file(path) for path in sorted(base_dir.glob("*.bin"))})
