"""Shows names from files (classes, layers, images, paths) in terminals, tables, Markdown and shell commands.

Names come from untrusted files. These functions escape control characters, formulas of spreadsheets, Markdown and shell
syntax; `docs/reference/security.md` says which output uses which function.
"""

from __future__ import annotations

import os
import re
import shlex
import string
import unicodedata
from typing import Any

NAME_LENGTH = 200
"""The most characters of one name in a message."""

PATH_LENGTH = 1000
"""The most characters of one path in a message."""

LINE_LENGTH = 2000
"""The most characters of one line of a message."""

# Letters, marks and symbols that are drawn as nothing. Format characters (category Cf) are not listed.
_INVISIBLE = frozenset(
    map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x2800, 0x3164, 0xFFA0))
) | frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
# Controls, format characters such as overrides of the direction, surrogates, separators of lines, and unassigned.
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn")
_MOST_MARKS = 4  # on one letter; more of them are drawn over other lines
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

_FORMULA = re.compile(r"(^|;)(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_SHELL_SAFE = frozenset(string.ascii_letters + string.digits + string.punctuation + " ") - frozenset("'\\")


def printable(name: object, length: int = NAME_LENGTH) -> str:
    r"""Returns a name as one line of visible text.

    Controls, line breaks, changes of direction, invisible characters and piles of accents are escaped as in Python:
    '\n', '\x1b', '\u202e'. A byte of a file name that is not UTF-8 is '\xff'. Showing a shown name changes nothing.

    Args:
      name: a name or a path.
      length: the most characters. Of longer names the middle is left out.
    """
    return _cut(escaped(_cut(str(name), 2 * length)), length)


def one_line(text: object) -> str:
    """Returns the words of a text, such as the message of an exception, in one line."""
    return " ".join(str(text).split())


def printable_path(path: str | os.PathLike[str]) -> str:
    """Returns a path as `printable` does, with room for deep folders."""
    return printable(os.fspath(path), PATH_LENGTH)


def escaped(text: str, kept: str = "") -> str:
    """Returns a text of any length with the characters escaped that `printable` escapes, except those in `kept`."""
    if text.isascii() and text.isprintable():
        return text
    parts, marks = [], 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category[0] == "M" else 0
        hidden = category in _ESCAPED or character in _INVISIBLE or marks > _MOST_MARKS
        parts.append(_escape(character) if hidden and character not in kept else character)
    return "".join(parts)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python reads a byte of a file name that is not UTF-8
        code -= 0xDC00
    if character in _SHORT:
        return _SHORT[character]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    tail = (length - 1) // 3
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


def printable_lines(text: object) -> str:
    """Returns a text of several lines for a terminal. Lines after the first are indented, so that none looks like ours.

    For texts of other programs, such as an exception of a library.
    """
    first, *others = str(text).split("\n")
    return "\n".join([printable(first, LINE_LENGTH), *(f"    {printable(line, LINE_LENGTH)}" for line in others)])


def csv_cell(value: Any) -> Any:
    """Returns a value for a CSV file that no spreadsheet takes for a formula. Numbers and None stay what they are.

    Text that begins with = + - or @ gets an apostrophe in front, also after a semicolon, which separates cells in some
    countries. Text that is a number does not. Control characters are escaped; nothing is cut.
    """
    if not isinstance(value, str):
        return value
    text = escaped(value)
    return text if _NUMBER.fullmatch(text) else _FORMULA.sub(r"\1'\2", text)


def in_markdown(text: object, length: int = LINE_LENGTH) -> str:
    """Returns a text as a code span, in which Markdown knows no links, images or HTML.

    A pipe is escaped, because parsers differ in which backslash before it keeps the column of a table together.
    """
    code = printable(text, length).replace("|", r"\x7c")
    if not code:
        return '`""`'
    fence = "`" * (1 + max(map(len, re.findall("`+", code)), default=0))
    # Markdown removes one space at both ends if there is one at both.
    pad = " " if code.strip() and {code[0], code[-1]} & {" ", "`"} else ""
    return f"{fence}{pad}{code}{pad}{fence}"


def in_shell(argument: str | os.PathLike[str]) -> str:
    r"""Returns a text that a shell reads as this one argument.

    What a terminal would not show goes into the form $'...' of bash, zsh and ksh, as bytes: $'a\nb'. A path that begins
    with a dash gets ./ in front, because programs would take it for an option.
    """
    text = os.fspath(argument)
    if isinstance(argument, os.PathLike) and text.startswith("-"):
        text = f"./{text}"
    if escaped(text) == text:
        quoted = shlex.quote(text)
        return f"'{text}'" if quoted == text and text.startswith("=") else quoted  # zsh expands =ls to the path of ls
    shell = (character if character in _SHELL_SAFE else _shell_escape(character) for character in text)
    return f"$'{''.join(shell)}'"


def _shell_escape(character: str) -> str:
    if escaped(character) == character and not character.isascii() and unicodedata.category(character)[0] != "M":
        return character
    errors = "surrogateescape" if 0xDC80 <= ord(character) <= 0xDCFF else "surrogatepass"
    return _SHORT.get(character) or "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors))


def command_line(arguments: list[str]) -> str:
    """Returns a command as it would be typed in a shell."""
    return " ".join(map(in_shell, arguments))


def file_stem(name: str, most_bytes: int = 180) -> str:
    """Returns a name as the first part of a file name, with room for a suffix. Slashes are replaced."""
    stem = escaped(name).replace("/", "_")
    while len(os.fsencode(stem)) > most_bytes:
        stem = stem[:-1]
    return stem if stem.strip(". ") else f"image{stem}"
