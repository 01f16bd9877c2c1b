"""Official files of benchmarks and instruction sets: where they are published, and how they come into DATA_DIR."""
