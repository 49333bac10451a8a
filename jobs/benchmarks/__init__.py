"""The benchmarks: each a module with `Settings` and `run`, and the ways that they compare with."""
