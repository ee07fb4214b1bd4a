"""Runs cases of cases.py: reads a name per line, answers each with a line of JSON: name, CPU seconds, error or null.

Wants TRITON_INTERPRET=1. What cases print goes to standard error.

The interpreter leaves products of matrices to numpy, whose float32 sums have another order for every shape and operand:
a score gets other bits in the backward pass than in the forward pass. A GPU adds float32 products one after another to
the accumulator. Products are taken in that order here.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from typing import Any

import numpy as np


def dot(builder: Any, a: Any, b: Any, accumulator: Any, *precision: Any) -> Any:
    """Stands in for ``InterpreterBuilder.create_dot``: float32 multiply-adds in the order of the summed axis."""
    rows, columns, total = a.data.astype(np.float64), b.data.astype(np.float64), accumulator.data
    for index in range(rows.shape[1]):
        total = (total + rows[:, index, None] * columns[index]).astype(np.float32)  # the product itself is exact
    return type(accumulator)(total, accumulator.dtype.scalar)


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")  # numpy's, of NaN and infinities; torch's, of kernels that are replaced

    import torch
    from cases import CASES
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot = dot
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, error, start = line.strip(), None, time.process_time()
        torch.manual_seed(0)
        try:
            CASES[name]()
        except AssertionError as failure:
            error = f"{failure}\n\n{traceback.format_exc()}"
        except BaseException:
            error = traceback.format_exc()
        answer = {"name": name, "seconds": time.process_time() - start, "error": error}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
