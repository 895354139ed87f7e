"""``python -m agent.inference.rebuild``: makes a bundle from a delta, alone in a process that may die of it.

Reads a `RebuildRequest` on standard input, and writes one `RebuildVerdict` on standard output. In between the base is
packed again from its extracted members and the delta applied, without network and under limits of memory and CPU: a
delta is a stranger's bytes until what it makes has been verified, which whoever started this process does.

The only importer of the decoders; a device may lack either.
"""

import hashlib
import io
import math
import os
import resource
import struct
import sys
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from agent.channel import RebuildRequest, RebuildVerdict
from agent.inference.kernel import NoIsolation, die_with_parent, limit_memory, take_network_away
from protocol.bundle import BadBundle, write_bundle
from protocol.manifest import MANIFEST_NAME, BadManifest, decode_manifest
from protocol.names import MAX_MANIFEST
from protocol.release import BSDIFF, ZSTD, ZSTD_PATCH
from runtime.measure import growth, memory_use

MAX_REQUEST = 64 * 1024  # bytes
MAX_WINDOW_LOG = 27  # zstd's own limit of what a decoder takes without being told: 128 MiB
CHUNK = 256 * 1024
_BSDIFF_HEADER = struct.Struct("<8sqqq")  # magic, control, diff, length of what it makes


class CannotRebuild(Exception):
    """The delta cannot be applied; the message says why."""


class Reader(Protocol):
    """What decoders give."""

    def read(self, size: int, /) -> bytes:
        """Return up to so many bytes, none at the end."""


def main() -> int:
    """Rebuild what standard input asks for; the exit code is 0 whenever there is a verdict."""
    die_with_parent(os.environ)
    request = msgspec.json.decode(sys.stdin.buffer.read(MAX_REQUEST), type=RebuildRequest)
    sys.stdout.buffer.write(msgspec.json.encode(rebuild(request)) + b"\n")
    sys.stdout.buffer.flush()
    return 0


def rebuild(request: RebuildRequest) -> RebuildVerdict:
    """Make the bundle. This process cannot be used for anything else afterwards."""
    try:
        take_network_away()
        _import_decoder(request.method)
        _limit(request)
        before = memory_use()
        with Path(request.made).open("wb") as made:
            apply(request, made)
        return RebuildVerdict(peak_memory=growth(before, memory_use()))
    except NoIsolation as error:
        return RebuildVerdict(trouble=f"the network cannot be taken away: {error}")
    except MemoryError:
        return RebuildVerdict(trouble=f"it needs more memory than the {request.memory_bytes} bytes it may take")
    except CannotRebuild as error:
        return RebuildVerdict(trouble=str(error))
    except OSError as error:
        return RebuildVerdict(trouble=f"the disk does not take it: {error}")


def apply(request: RebuildRequest, made: BinaryIO) -> None:
    """Write the bundle that the delta makes; raise `CannotRebuild` or MemoryError."""
    if request.method == BSDIFF:
        _patch(request, made)
    else:
        _inflate(request, made)


# ---------------------------------------------------------------- the base
def base_of(request: RebuildRequest) -> bytes:
    """Return the bundle a delta starts from, packed again from its members: the same content is the same bytes."""
    folder = Path(request.folder)
    try:
        with (folder / MANIFEST_NAME).open("rb") as source:
            manifest = decode_manifest(source.read(MAX_MANIFEST + 1))
        packed = io.BytesIO()
        write_bundle(packed, manifest, {name: (folder / name).read_bytes() for name in manifest.members})
    except (BadManifest, BadBundle, OSError) as error:
        raise CannotRebuild(f"the base cannot be packed again: {error}") from error
    base = packed.getvalue()
    if hashlib.sha256(base).hexdigest() != request.base:
        raise CannotRebuild("the base, packed again, is not the bundle that was downloaded once")
    return base


# ---------------------------------------------------------------- the methods
def _inflate(request: RebuildRequest, made: BinaryIO) -> None:
    import zstandard

    dictionary = None
    if request.method == ZSTD_PATCH:
        dictionary = zstandard.ZstdCompressionDict(base_of(request), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    decoder = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << MAX_WINDOW_LOG)
    try:
        with Path(request.delta).open("rb") as source, decoder.stream_reader(source) as reader:
            _copy(reader, made, request.length)
    except zstandard.ZstdError as error:
        if "emory" in str(error):
            raise MemoryError from error
        raise CannotRebuild(f"the delta is damaged: {error}") from error


def _patch(request: RebuildRequest, made: BinaryIO) -> None:
    import bsdiff4

    delta = Path(request.delta).read_bytes()
    _check_header(delta, request.length)
    try:
        _copy(io.BytesIO(bsdiff4.patch(base_of(request), delta)), made, request.length)
    except (ValueError, EOFError, OSError) as error:  # bz2 speaks of damage as OSError
        raise CannotRebuild(f"the delta is damaged: {error}") from error


def _check_header(delta: bytes, length: int) -> None:
    """Refuse a delta that announces another length, before anything is made room for."""
    if len(delta) < _BSDIFF_HEADER.size:
        raise CannotRebuild("the delta is damaged: it ends in its header")
    announced = _BSDIFF_HEADER.unpack_from(delta)[3]
    if announced != length:
        raise CannotRebuild(f"the delta announces {announced} bytes, signed are {length}")


def _copy(reader: Reader, made: BinaryIO, length: int) -> None:
    left = length
    while chunk := reader.read(min(CHUNK, left + 1)):
        left -= len(chunk)
        if left < 0:
            raise CannotRebuild(f"the delta makes more than the {length} bytes that were signed")
        made.write(chunk)
    if left:
        raise CannotRebuild(f"the delta makes {left} bytes less than were signed")


# ---------------------------------------------------------------- limits
def _import_decoder(method: str) -> None:
    """Import before the memory is limited: the decoder's own code is not the delta's doing."""
    try:
        if method in {ZSTD, ZSTD_PATCH}:
            import zstandard  # noqa: F401 - loaded now, used later
        elif method == BSDIFF:
            import bsdiff4  # noqa: F401 - loaded now, used later
        else:
            raise CannotRebuild(f"{method!r} is not known here")
    except ImportError as error:
        raise CannotRebuild(f"{method} cannot be applied on this device: {error}") from error


def _limit(request: RebuildRequest) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime) + request.cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    limit_memory(request.memory_bytes)


if __name__ == "__main__":
    sys.exit(main())
