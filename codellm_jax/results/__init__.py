"""What came out of an evaluation, and how sure one may be of it. Needs numpy, and in places SciPy and matplotlib."""
