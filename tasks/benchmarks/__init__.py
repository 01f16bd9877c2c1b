"""Benchmarks as questions, independent of any model: the study's ten, a few beside them, and files of one's own.

`loading.load` reads them.
"""
