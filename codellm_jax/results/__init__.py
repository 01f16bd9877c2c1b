"""How sure one may be of a score: intervals, paired tests, seeds, levels to read it against. Needs numpy and SciPy."""
