"""The parts of `scripts/merge_matrix.py`: tiny models, adapters by stock peft, one cell."""
