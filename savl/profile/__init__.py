"""Where the time goes: named ranges for profilers, a profile of a step, and the roofline of the ops.

`annotate` is all that a program of one's own needs; ``python -m savl.profile`` does the rest (``--guide`` explains it).
"""

from savl.profile.ranges import annotate, named_range

__all__ = ["annotate", "named_range"]
