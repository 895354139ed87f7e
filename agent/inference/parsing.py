"""The head of an HTTP/1.1 request: bytes in, `Head` out, or an `HttpError` that says what is wrong.

Strict where leniency has been used for attacks: one Content-Length, one Host, no folded lines, no bare line ends.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
REMEMBERED = 64  # heads that were understood
MAX_REMEMBERED = 1024  # bytes of one of them
MAX_DIGITS = 18  # of a length; longer ones are over every cap anyway
_METHOD = re.compile(r"[A-Z]{1,16}")
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_ILLEGAL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_DIGITS = re.compile(r"[0-9]+")
_ONCE = frozenset(
    {"content-length", "content-encoding", "host", "transfer-encoding", "inference-header-content-length", "expect"}
)
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::[0-9]*)?")
_ORIGIN = re.compile(r"https?://(.+)")


class HttpError(Exception):
    """A request is answered with an error. ``close``: what follows on the connection cannot be understood."""

    def __init__(
        self, status: int, message: str, *, headers: Mapping[str, str] | None = None, close: bool = False
    ) -> None:
        """Carry the status and the sentence that the client reads under ``error``."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}
        self.close = close


@dataclass(frozen=True, kw_only=True)
class Head:
    """One request's head. ``path`` holds the decoded segments; the query is left as it came."""

    method: str
    path: tuple[str, ...]
    keep_alive: bool
    content_length: int = 0
    json_length: int | None = None  # Inference-Header-Content-Length
    expects_continue: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    query: str = ""


def parse_head(data: bytes) -> Head:
    """Return the head in ``data`` (without its final empty line); raise `HttpError`.

    A client that keeps asking sends the same head over and over: it is understood once, and the same `Head` returned.
    """
    return _understood(data) if len(data) <= MAX_REMEMBERED else _understand(data)


def _understand(data: bytes) -> Head:
    first, *lines = data.decode("latin-1").split("\r\n")
    method, target, version = _request_line(first)
    headers = _fields(lines)
    return Head(
        method=method,
        path=_segments(target),
        keep_alive=_keeps_alive(version, headers),
        content_length=_content_length(headers),
        json_length=_length(headers, "inference-header-content-length"),
        expects_continue=headers.get("expect", "").lower() == "100-continue",
        headers=headers,
        query=target.partition("?")[2],
    )


_understood = functools.lru_cache(maxsize=REMEMBERED)(_understand)


def check_local(head: Head) -> None:
    """Refuse a request that a web page made through somebody's browser (DNS rebinding, foreign origin)."""
    host = head.headers.get("host")
    if host is None:
        raise HttpError(400, "the Host header is missing")
    if not _is_local(host):
        raise HttpError(
            403, f"the Host header names {host[:80]!r}; this server answers to localhost and 127.0.0.1 only"
        )
    origin = head.headers.get("origin")
    if origin is not None and not ((match := _ORIGIN.fullmatch(origin)) and _is_local(match[1])):
        raise HttpError(403, f"pages of {origin[:80]!r} may not ask this server")


def _is_local(host: str) -> bool:
    match = _HOST.fullmatch(host)
    return match is not None and match[1].lower() in LOCAL_HOSTS


def _request_line(line: str) -> tuple[str, str, str]:
    parts = line.split(" ")
    if len(parts) != 3 or not _METHOD.fullmatch(parts[0]):  # noqa: PLR2004 - method, target, version
        raise HttpError(400, "this is not an HTTP request line", close=True)
    method, target, version = parts
    if version not in {"HTTP/1.1", "HTTP/1.0"}:
        raise HttpError(505, f"{version[:20]!r} is not spoken here, HTTP/1.1 is", close=True)
    if not target.startswith("/") or _ILLEGAL.search(target):
        raise HttpError(400, "the request target must be a path", close=True)
    return method, target, version


def _fields(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _FIELD_NAME.fullmatch(name) or _ILLEGAL.search(value):
            raise HttpError(400, f"header line {line[:60]!r} is not legal", close=True)
        key = name.lower()
        if key in headers and key in _ONCE:
            raise HttpError(400, f"header {name} stands twice", close=True)
        headers[key] = value.strip(" \t")
    return headers


def _segments(target: str) -> tuple[str, ...]:
    path = target.partition("?")[0]
    return tuple(unquote(segment) for segment in path.strip("/").split("/"))


def _keeps_alive(version: str, headers: Mapping[str, str]) -> bool:
    wish = headers.get("connection", "").lower()
    return wish != "close" if version == "HTTP/1.1" else wish == "keep-alive"


def _content_length(headers: Mapping[str, str]) -> int:
    coding = headers.get("transfer-encoding")
    if coding is not None:
        raise HttpError(501, f"Transfer-Encoding {coding[:20]!r} is not offered; send a Content-Length", close=True)
    return _length(headers, "content-length") or 0


def _length(headers: Mapping[str, str], name: str) -> int | None:
    text = headers.get(name)
    if text is None:
        return None
    if not _DIGITS.fullmatch(text):
        raise HttpError(400, f"{name} {text[:20]!r} is not a number", close=True)
    if len(text) > MAX_DIGITS:
        raise HttpError(413, f"{name} is over every cap", close=True)
    return int(text)
