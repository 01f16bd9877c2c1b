"""Documents of users made into training text: cleaned, without duplicates and benchmarks, sampled. `t5x prepare`."""
