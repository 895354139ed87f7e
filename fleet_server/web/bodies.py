"""Bodies too large to hold: an upload as an iterator for a thread, and a file answered in ranges."""

import re
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from typing import IO

from anyio import from_thread
from litestar import Response
from litestar.response import Stream

CHUNK = 256 * 1024  # bytes
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class UnsatisfiableRange(Exception):
    """A range that lies outside of the file."""


def chunks_in_thread(stream: AsyncIterator[bytes]) -> Iterator[bytes]:
    """Return the body's chunks for code that runs in a thread started by ``anyio.to_thread``."""

    async def next_chunk() -> bytes | None:
        return await anext(stream, None)

    while (chunk := from_thread.run(next_chunk)) is not None:
        yield chunk


def range_of(header: str | None, length: int) -> tuple[int, int] | None:
    """Return first and last byte of a Range header; None when the whole file is to be sent.

    RFC 9110 §14.2: a header that is not understood (several ranges, another unit) is ignored.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return _last_bytes(int(last), length)
    start, end = int(first), min(int(last), length - 1) if last else length - 1
    if last and int(last) < start:
        return None
    if start >= length:
        raise UnsatisfiableRange
    return start, end


def send_file(
    file: IO[bytes], length: int, *, etag: str, range_: str | None, if_range: str | None
) -> Response[bytes] | Stream:
    """Answer with a file, or the part of it that was asked for; the file is closed at the end."""
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{etag}"'}
    if if_range is not None and if_range.strip('"') != etag:
        range_ = None
    try:
        wanted = range_of(range_, length)
    except UnsatisfiableRange:
        file.close()
        headers["Content-Range"] = f"bytes */{length}"
        return Response(b"", status_code=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers=headers)
    start, end = wanted or (0, length - 1)
    headers["Content-Length"] = str(end - start + 1)
    if wanted is not None:
        headers["Content-Range"] = f"bytes {start}-{end}/{length}"
    return Stream(
        _read(file, start, end - start + 1),
        status_code=HTTPStatus.PARTIAL_CONTENT if wanted is not None else HTTPStatus.OK,
        media_type="application/octet-stream",
        headers=headers,
    )


def _last_bytes(count: int, length: int) -> tuple[int, int]:
    if count == 0 or length == 0:
        raise UnsatisfiableRange
    return max(0, length - count), length - 1


def _read(file: IO[bytes], start: int, count: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while count > 0 and (chunk := file.read(min(CHUNK, count))):
            count -= len(chunk)
            yield chunk
