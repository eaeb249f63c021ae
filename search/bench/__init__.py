"""Benchmarks as commands; each prints one table. Ratios come from one process, interleaved."""
