"""Turns the text of a TOML file into strict settings, with errors that name the key and the line.

Shared by all programs so that a wrong key reads the same everywhere. Which keys exist is each program's own business;
reading the file is its caller's.
"""

import re
import sys
from typing import TypeVar, get_args

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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise BadSettings(file, 0, f"not TOML: {error}") from error


def _explain(problem: str, text: str, type_: type, file: str) -> BadSettings:
    if unknown := _UNKNOWN.match(problem):
        path, key = (unknown["path"] or "").strip("."), unknown["key"]
        known = ", ".join(_keys(type_, path))
        message = f"unknown key {_plain(f'{path}.{key}' if path else key)!r}; known here: {known}"
        return BadSettings(file, _line_of(text, path, key), message)
    wrong = _WRONG.match(problem)
    if wrong is None:
        return BadSettings(file, 0, problem)
    table, _, key = wrong["path"].strip(".").rpartition(".")
    message = f"{_plain(wrong['path'].strip('.'))}: {wrong['what']}"
    return BadSettings(file, _line_of(text, table, _plain(key)), message)


def _plain(path: str) -> str:
    """Return a path without the indices of lists."""
    return re.sub(r"\[[^\]]*\]", "", path)


def _keys(type_: type, path: str) -> list[str]:
    """Return the keys that a table may have; a list of tables has those of its items."""
    structs = [type_]
    for part in filter(None, _plain(path).split(".")):
        fields = [field for struct in structs for field in msgspec.structs.fields(struct)]
        structs = [struct for field in fields if field.encode_name == part for struct in _structs(field.type)]
    return list(dict.fromkeys(field.encode_name for struct in structs for field in msgspec.structs.fields(struct)))


def _structs(annotation: object) -> list[type]:
    """Return the structs that may stand in a field: its own type, those of a union, those in a list."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return [annotation]
    return [struct for part in get_args(annotation) for struct in _structs(part)]


def _line_of(text: str, table: str, key: str) -> int:
    """Return the line on which a key of a table stands (or the table itself when the key is one), 0 if not found.

    ``table`` may end in the index of a list of tables: ``pipeline[1]`` is the second ``[[pipeline]]``.
    """
    index = int(match[1]) if (match := re.search(r"\[(\d+)\]$", table)) else 0
    table, current, seen = _plain(table), "", -1
    header = re.compile(r"\s*\[+\s*([^\]]+?)\s*\]+")
    entry = re.compile(rf"\s*(?:\"{re.escape(key)}\"|{re.escape(key)})\s*[.=]")
    for number, line in enumerate(text.splitlines(), 1):
        if match := header.match(line):
            current = match[1]
            seen += current == table
            if current == (f"{table}.{key}" if table else key):
                return number
        elif current == table and (not table or seen == index) and entry.match(line):
            return number
    return 0
