"""Trainers: one algorithm per file, each an `XConfig` and an `XTrainer` on `trainers/base.py`."""
