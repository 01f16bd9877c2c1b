"""Upstream T5X: its trainer in the place of this package's own, this package's decoder for its commands, and its
checkpoints as runs. T5X has no release; docs/t5x.md says how it is installed. Nothing else here needs it.
"""
