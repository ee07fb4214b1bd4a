"""Escape text from outside, such as names of files, so that it can be printed on a terminal and stays on one line."""

from __future__ import annotations

import unicodedata

# Control characters, surrogates (bytes that are not text), and separators of lines and paragraphs.
_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Characters that change the direction of the text after them, which can make a name look like another.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""Return the text with characters that control a terminal or end the line escaped as in Python: \n, \x1b, \u202e.

    Bytes of a file name that are not text in the locale become \x and their digits.
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
