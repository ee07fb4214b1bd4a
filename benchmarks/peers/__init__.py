"""Implementations of the same computations by other libraries, which the suites compare with."""
