"""Upstream T5X: its trainer as a replacement for this package's own, this package's decoder for its commands, and its
checkpoints as runs. T5X has no release; docs/t5x.md describes its installation. The rest of the package does not need
it.
"""
