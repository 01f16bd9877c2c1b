"""Benchmarks as questions, independent of any model: the study's ten, a few more, and users' files.

`loading.load` reads them.
"""
