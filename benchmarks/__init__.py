"""Benchmarks of speed and memory. Run them from the root of a checkout; see README.md in this folder."""
