"""Content codings of HTTP: bodies that come and go as gzip or deflate (zlib).

What is inflated is capped before it is inflated: a small body may announce a very large one.
"""

import zlib
from collections.abc import Mapping

from agent.inference.parsing import HttpError

IDENTITY, GZIP, DEFLATE = "identity", "gzip", "deflate"
WORTHWHILE = 1024  # bytes; less goes in one packet either way
_WINDOW = {GZIP: 16 + zlib.MAX_WBITS, DEFLATE: zlib.MAX_WBITS}
_LEVEL = 1  # the fastest: client and server share the machine


def coding_of(headers: Mapping[str, str]) -> str:
    """Return how a request's body is coded; raise `HttpError` for a coding that is not offered."""
    coding = headers.get("content-encoding", IDENTITY).lower()
    if coding not in {IDENTITY, *_WINDOW}:
        raise HttpError(415, f"Content-Encoding {coding[:20]!r} is not offered; gzip, deflate and identity are")
    return coding


def accepted_coding(headers: Mapping[str, str]) -> str:
    """Return the coding of a response that the client prefers among ours; ``identity`` unless it names one."""
    if "accept-encoding" not in headers:
        return IDENTITY
    weights = dict(_weighted(wish) for wish in headers["accept-encoding"].lower().split(","))
    best = max((GZIP, DEFLATE), key=lambda coding: weights.get(coding, 0.0))
    return best if weights.get(best, 0.0) > 0 else IDENTITY


def _weighted(wish: str) -> tuple[str, float]:
    coding, _, parameter = wish.partition(";")
    name, _, value = parameter.strip().partition("=")
    try:
        return coding.strip(), float(value) if name.strip() == "q" else 1.0
    except ValueError:
        return coding.strip(), 0.0


def inflated(body: memoryview, coding: str, cap: int) -> memoryview:
    """Return a body as it was before it was coded; raise `HttpError` when that is damaged or over the cap."""
    if coding == IDENTITY or not len(body):
        return body
    inflater = zlib.decompressobj(_WINDOW[coding])
    try:
        data = inflater.decompress(body, cap + 1)
    except zlib.error as error:
        raise HttpError(400, f"the body is not {coding}: {error}") from error
    if len(data) > cap:
        raise HttpError(413, f"the body has more than {cap} bytes when it is inflated; that is over the cap here")
    if not inflater.eof or inflater.unused_data:
        raise HttpError(400, f"the body is not one whole {coding} stream")
    return memoryview(data)


def deflated(parts: tuple[bytes, ...], coding: str) -> tuple[bytes, ...]:
    """Return a body's parts in a coding, as one part."""
    deflater = zlib.compressobj(_LEVEL, wbits=_WINDOW[coding])
    return (b"".join([*(deflater.compress(part) for part in parts), deflater.flush()]),)
