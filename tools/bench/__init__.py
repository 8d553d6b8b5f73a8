"""The training steps that the benchmarks compare."""
