"""The checkpoints that files are made from."""

from tests.checkpoints import llama_dir, make_checkpoint

__all__ = ["llama_dir", "make_checkpoint"]
