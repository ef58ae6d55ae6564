"""Pieces of the benchmarks at full size, which need a GPU."""
