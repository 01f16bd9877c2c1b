"""The uncertainty of scores: intervals, paired tests, seeds, and reference levels. Needs numpy and SciPy."""
