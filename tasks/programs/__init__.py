"""Runs untrusted programs against their tests, confined and judged from outside."""
