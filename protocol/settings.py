"""Turns the text of a TOML file into strict settings, with errors that name the key and the line.

Shared by all programs so that a wrong key reads the same everywhere. Which keys exist is each program's own business;
reading the file is its caller's.
"""

import re
import sys
from typing import TypeVar

import msgspec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
MAX_SETTINGS = 256 * 1024  # bytes
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`(?: - at `\$\.?(?P<path>[^`]*)`)?")
_WRONG = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>[^`]*)`")


class BadSettings(ValueError):
    """A settings file cannot be used. Fields: ``file``, ``line`` (1-based, 0 when unknown)."""

    def __init__(self, file: str, line: int, message: str) -> None:
        """Read as ``file:line: message``."""
        super().__init__(f"{file}:{line}: {message}" if line else f"{file}: {message}")
        self.file = file
        self.line = line


def decode_settings(text: str, type_: type[T], file: str) -> T:
    """Decode TOML into a struct; raise `BadSettings` for bad TOML, an unknown key or a wrong value."""
    if len(text.encode()) > MAX_SETTINGS:
        raise BadSettings(file, 0, f"the file is larger than the {MAX_SETTINGS} bytes allowed")
    try:
        return msgspec.convert(tomllib.loads(text), type_)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise BadSettings(file, int(line[1]) if line else 0, f"not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise _explain(str(error), text, type_, file) from error


def _explain(problem: str, text: str, type_: type, file: str) -> BadSettings:
    if unknown := _UNKNOWN.match(problem):
        path = _clean(unknown["path"] or "")
        key = unknown["key"]
        full = f"{path}.{key}" if path else key
        known = ", ".join(_keys(type_, path))
        return BadSettings(file, _line_of(text, path, key), f"unknown key {full!r}; known here: {known}")
    wrong = _WRONG.match(problem)
    if wrong is None:
        return BadSettings(file, 0, problem)
    path = _clean(wrong["path"])
    table, _, key = path.rpartition(".")
    return BadSettings(file, _line_of(text, table, key), f"{path}: {wrong['what']}")


def _clean(path: str) -> str:
    return re.sub(r"\[\.*\]", "", path).strip(".")


def _keys(type_: type, path: str) -> list[str]:
    for part in filter(None, path.split(".")):
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(type_)}
        type_ = fields[part]
    return [field.encode_name for field in msgspec.structs.fields(type_)]


def _line_of(text: str, table: str, key: str) -> int:
    """Return the line on which a key of a table stands (or the table itself when the key is one), 0 if not found."""
    current = ""
    header = re.compile(r"\s*\[+\s*([^\]]+?)\s*\]+")
    entry = re.compile(rf"\s*(?:\"{re.escape(key)}\"|{re.escape(key)})\s*[.=]")
    for number, line in enumerate(text.splitlines(), 1):
        if match := header.match(line):
            current = match[1]
            if current == (f"{table}.{key}" if table else key):
                return number
        elif current == table and entry.match(line):
            return number
    return 0
