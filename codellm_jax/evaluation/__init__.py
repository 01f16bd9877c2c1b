"""Evaluation and inference: benchmarks, prompts, other suites; log-likelihoods and decoding. Independent of gin."""
