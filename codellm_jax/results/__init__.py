"""What came out of an evaluation, and how sure one may be of it. Needs numpy, and where they are used SciPy and matplotlib."""
