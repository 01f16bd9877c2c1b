"""Speed and memory relative to named peers, as ratios within one run: `python -m benchmarks.NAME`. Not part of the
tests.
"""
