"""Untrusted programs and their tests: confined, run, and judged from outside."""
