"""Official files of benchmarks and instruction sets: their locations and download."""
