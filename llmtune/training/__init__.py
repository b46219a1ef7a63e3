"""Training an adapter; trl is used here and nowhere else.

Read `train.py` for a run from its start to its result, `step.py` for one step, and `batch.py` and
`objectives/` for what goes into it. `trainer.py` is what trl's trainer is made to do.
"""
