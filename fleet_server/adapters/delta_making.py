"""``python -m fleet_server.adapters.delta_making``: makes the deltas to one bundle, in a process that may die of it.

Reads a `Making` on standard input and leaves one file for each method that worked, beside each other; a method that
fails or is killed takes only itself along. The only importer of the encoders.
"""

import logging
import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import bsdiff4
import msgspec
import zstandard

from protocol.bundle import digest_of_stream
from protocol.release import BSDIFF, ZSTD, ZSTD_PATCH

MAX_REQUEST = 64 * 1024  # bytes
MIB = 1024 * 1024
MAX_COMPRESSED = 512 * MIB  # bundles above are served as they are
MAX_PATCHED = 64 * MIB  # of base and target each, for a patch by zstd: its window has to reach over both
MAX_BSDIFF = 24 * MIB  # of base and target each: its suffix array takes 16 bytes for each of the base
BEST_LEVEL, QUICK_LEVEL = 19, 9
BEST_UP_TO = 64 * MIB  # larger bundles would take minutes at the best level
MAX_WINDOW_LOG = 27  # what every decoder takes without being told: 128 MiB
NICE = 10
_log = logging.getLogger(__name__)


class Making(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be made. Paths are of files; without a base, the target is compressed."""

    target: str
    target_sha256: str
    base: str = ""
    base_sha256: str = ""
    out: str  # each method's name is appended
    memory_bytes: int  # of this process (RLIMIT_DATA)
    cpu_seconds: int


def main() -> int:
    """Make what standard input asks for."""
    making = msgspec.json.decode(sys.stdin.buffer.read(MAX_REQUEST), type=Making)
    os.nice(NICE)
    methods = methods_for(making)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (making.memory_bytes, making.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (making.cpu_seconds, making.cpu_seconds + 1))
    if not _is_what_it_says(making.target, making.target_sha256):
        return 1
    if making.base and not _is_what_it_says(making.base, making.base_sha256):
        return 1
    for method, encode in methods:
        _make(making, method, encode)
    return 0


Encoder = Callable[[bytes, bytes], bytes]


def methods_for(making: Making) -> Sequence[tuple[str, Encoder]]:
    """Return the methods that suit the sizes, the cheapest first."""
    target = Path(making.target).stat().st_size
    base = Path(making.base).stat().st_size if making.base else 0
    largest = max(target, base)
    found: list[tuple[str, Encoder]] = []
    if not making.base:
        found += [(ZSTD, compress)] if target <= MAX_COMPRESSED else []
    else:
        found += [(ZSTD_PATCH, patch_from)] if largest <= MAX_PATCHED else []
        found += [(BSDIFF, bsdiff)] if largest <= MAX_BSDIFF else []
    return found


def compress(_base: bytes, target: bytes) -> bytes:
    """Return the target as one zstd frame."""
    level = BEST_LEVEL if len(target) <= BEST_UP_TO else QUICK_LEVEL
    return _encoded(zstandard.ZstdCompressor(level=level), target)


def patch_from(base: bytes, target: bytes) -> bytes:
    """Return the target as a zstd frame whose raw dictionary is the base, with a window that reaches over both."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        BEST_LEVEL,
        window_log=min(MAX_WINDOW_LOG, max(10, (len(base) + len(target)).bit_length())),
        enable_ldm=True,
    )
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return _encoded(zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters), target)


def bsdiff(base: bytes, target: bytes) -> bytes:
    """Return a BSDIFF40 patch."""
    made: bytes = bsdiff4.diff(base, target)
    return made


def _encoded(encoder: zstandard.ZstdCompressor, target: bytes) -> bytes:
    try:
        return encoder.compress(target)
    except zstandard.ZstdError as error:  # out of memory, mostly
        raise ValueError(str(error)) from error


def _make(making: Making, method: str, encode: Encoder) -> None:
    try:
        base = Path(making.base).read_bytes() if making.base else b""
        made = encode(base, Path(making.target).read_bytes())
    except (MemoryError, ValueError, OSError) as error:
        _log.warning("%s: %s", method, str(error) or type(error).__name__)
        return
    partial = Path(f"{making.out}{method}.part")
    partial.write_bytes(made)
    partial.replace(f"{making.out}{method}")


def _is_what_it_says(path: str, sha256: str) -> bool:
    with Path(path).open("rb") as file:
        return digest_of_stream(file) == sha256


if __name__ == "__main__":
    sys.exit(main())
