"""Makes `small_savl`, `spandrel_import` and `checks` importable by the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[1] / "accelerate"):
    sys.path.append(str(folder))
