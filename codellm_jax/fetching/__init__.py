"""Official files of benchmarks and instruction sets: where they are published, and their download."""
