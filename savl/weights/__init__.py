"""Build networks by name, load and save their weights, and list the weights that are shipped with the package."""

from savl.weights.files import build, load, load_savl, save, shipped
from savl.weights.spandrel_model import SpandrelModel

__all__ = ["SpandrelModel", "build", "load", "load_savl", "save", "shipped"]
