"""Run `savl profile` as ``python -m savl.profile``, the form in which the profilers of a GPU start it."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["profile"]
    runpy.run_module("savl", run_name="__main__")
