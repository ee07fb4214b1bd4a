"""Build networks by name, load and save their weights, and list the weights that are shipped with the package."""

from savl.weights.files import build, load, save, shipped

__all__ = ["build", "load", "save", "shipped"]
