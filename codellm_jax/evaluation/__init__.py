"""A trained model asked: benchmarks, prompts, other suites; log-likelihoods and decoding. Knows no gin."""
