"""Text from outside, such as names of files, as it may be shown on a terminal and in a log of one line a fact."""

from __future__ import annotations

import unicodedata

# Controls, halves of UTF-16 pairs (bytes that are no text), and separators of lines and paragraphs.
_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
# What turns the direction of the text behind it, so that a name looks like another.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""Return the text with what would steer a terminal or end the line written as in Python: \n, \x1b, \u202e.

    Bytes of a file name that are no text in the locale become \x and their digits.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _CATEGORIES and character not in _DIRECTIONS:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # PEP 383
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode() if code < 0xD800 else f"\\u{code:04x}"
