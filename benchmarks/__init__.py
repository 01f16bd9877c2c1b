"""Speed and memory beside named peers, as ratios within one run: `python -m benchmarks.NAME`. Never a timed test."""
