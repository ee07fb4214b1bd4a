"""Weights: build networks, load and save their files, and the weights that ship with the package."""

from savl.weights.files import build, load, save, shipped

__all__ = ["build", "load", "save", "shipped"]
