"""The pieces of `bench_train.py`: rows, base models, arms, and the parity gate."""
