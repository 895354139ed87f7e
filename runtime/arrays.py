"""Reads ``.npz`` files that may come from anywhere, inside a cap and without pickle.

numpy allocates what an array's header promises before it reads a byte, so the promise is held against the size of
the member first. What the arrays mean is known to `runtime.golden` and to the converters.
"""

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy.typing as npt
from numpy.lib import format as npy_format

MAX_ARRAYS = 64
_SUFFIX = ".npy"
_UNREADABLE = (  # what the readers of ZIP, of DEFLATE and of a header's Python literal raise for damaged ones
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
    EOFError,
    OverflowError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
_npy: Any = npy_format  # this module of numpy has no types


class BadArrays(ValueError):
    """The file is not an ``.npz`` of plain numbers, or is over its cap."""


def read_arrays(path: str | Path, cap: int) -> dict[str, npt.NDArray[Any]]:
    """Return every array of an ``.npz``, ``cap`` bytes in all at most; raise `BadArrays`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_sizes(path, members, cap)
            return {member.filename.removesuffix(_SUFFIX): _read(path, archive, member) for member in members}
    except BadArrays:
        raise
    except FileNotFoundError as error:
        raise BadArrays(f"{path}: there is no such file") from error
    except _UNREADABLE as error:
        raise BadArrays(f"{path}: not a readable .npz: {error}") from error


def _check_sizes(path: str | Path, members: list[zipfile.ZipInfo], cap: int) -> None:
    if len(members) > MAX_ARRAYS:
        raise BadArrays(f"{path}: {len(members)} arrays are over the cap of {MAX_ARRAYS}")
    total = sum(member.file_size for member in members)
    if total > cap:
        raise BadArrays(f"{path}: {total} bytes of arrays are over the cap of {cap}")


def _read(path: str | Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    try:
        with archive.open(member) as stream:
            _check_promise(stream, member)
        with archive.open(member) as stream:
            array: npt.NDArray[Any] = _npy.read_array(stream, allow_pickle=False)
            return array
    except _UNREADABLE as error:
        raise BadArrays(f"{path}: {member.filename}: {error}") from error


def _check_promise(stream: IO[bytes], member: zipfile.ZipInfo) -> None:
    """Raise ValueError when the header promises more than the member holds, or Python objects."""
    version = _npy.read_magic(stream)
    read_header = _npy.read_array_header_1_0 if version == (1, 0) else _npy.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("holds Python objects (pickle), which are never loaded")
    promised = dtype.itemsize
    for size in shape:  # Python integers: the product cannot wrap around
        promised *= int(size)
    if promised > member.file_size:
        raise ValueError(f"its header promises {promised} bytes, the member has {member.file_size}")
