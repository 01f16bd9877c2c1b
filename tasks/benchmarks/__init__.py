"""The study's ten benchmarks as questions, independent of any model: `loading.load` reads them."""
