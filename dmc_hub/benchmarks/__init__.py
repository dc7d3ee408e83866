"""Measurements as ratios within one run; `scripts/benchmark.py` runs them and writes JSON."""
