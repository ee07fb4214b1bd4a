"""What libvips says when something fails, in words for people."""

from __future__ import annotations

import re

from savl.out_of_memory import says_out_of_memory

# Lines that stand beside the reason of a failure, and also where nothing failed.
_COMMON = ("unable to call", "source: bad seek")


def tidy(message: str) -> str:
    """Return libvips' several lines of 'unable to call …' and 'domain: text', down to the most telling text, or ""."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_COMMON) and not line.endswith(": load error")]
    most = min(telling, key=lambda line: line.startswith("unable to"), default="")
    return re.sub(r"^\w+: ", "", most)


def is_lack_of_memory(message: str) -> bool:
    """Return whether libvips, or a library it decodes with, failed for want of memory."""
    return says_out_of_memory(message) or re.search(r"allocate memory|memory allocation", message, re.I) is not None
