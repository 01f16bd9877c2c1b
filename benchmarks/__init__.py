"""Benchmarks of speed and memory, mostly against named peers as ratios within one run: `python -m benchmarks.NAME`.

They are not part of the tests.
"""
