"""The parts of `scripts/families.py`: one family taken through every stage of a run."""
