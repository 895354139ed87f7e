"""Repeats of a request that creates something: an ``Idempotency-Key`` gets the same answer for a day, and one effect.

The key belongs to the user. The same key with another request is refused (422). While the first request is under way,
or when the server ended before it could keep the answer, a repeat is refused as well (409): then nobody can tell from
here whether it was done, and looking is better than guessing.
"""

import hashlib
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import NoReturn

import msgspec
from litestar import Request, Response
from litestar.concurrency import sync_to_thread
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException

from fleet_server.ingest import StoreUnavailable
from fleet_server.ports import KeptAnswers

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
MIN_KEY, MAX_KEY = 16, 128  # characters; a random UUID has 36
LIFE = 24 * 3600 * 1000  # ms
AnyRequest = Request[object, object, State]
_log = logging.getLogger(__name__)


class KeptAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What was answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def response(self) -> Response[bytes]:
        """Return it again, marked as such."""
        headers = {name: value for name, value in self.headers.items() if name != "content-type"}
        return Response(
            self.body,
            status_code=self.status,
            media_type=self.headers.get("content-type", "application/json"),
            headers={**headers, REPLAYED: "true"},
        )


class AnsweredBefore(Exception):
    """Not a fault: the answer is there already. Field: ``answer``."""

    def __init__(self, answer: KeptAnswer) -> None:
        """Keep the answer."""
        super().__init__("answered before")
        self.answer = answer


class Repeats:
    """Looks keys up before a request, and keeps its answer after."""

    def __init__(self, answers: KeptAnswers, clock: Callable[[], int]) -> None:
        self._answers = answers
        self._clock = clock

    async def begin(self, request: AnyRequest, account: str) -> str | None:
        """Return the key under which the answer shall be kept, None without one.

        Raises `AnsweredBefore`, ClientException (a bad key), HTTPException 409 or 422.
        """
        given = request.headers.get(HEADER)
        if given is None:
            return None
        if not MIN_KEY <= len(given) <= MAX_KEY or not given.isascii() or not given.isprintable():
            raise ClientException(f"{HEADER} has {MIN_KEY} to {MAX_KEY} printable ASCII characters, random ones")
        key = f"{account}\n{given}"
        asked = f"{request.method} {request.url.path}\n".encode() + await request.body()
        await sync_to_thread(self._begin, key, hashlib.sha256(asked).hexdigest())
        return key

    async def end(self, key: str, status: int, headers: dict[str, str], body: bytes) -> None:
        """Keep an answer when something was created, else let the key be used again."""
        try:
            if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
                answer = KeptAnswer(status=status, headers=headers, body=body)
                await sync_to_thread(self._answers.keep, key, msgspec.msgpack.encode(answer))
            else:
                await sync_to_thread(self._answers.drop, key)
        except StoreUnavailable as error:
            _log.warning("the answer to a request with an %s could not be kept: %s", HEADER, error)

    def _begin(self, key: str, request_sha256: str) -> None:
        if not self._answers.begin(key, request_sha256, self._clock()):
            self._repeat(key, request_sha256)

    def _repeat(self, key: str, request_sha256: str) -> NoReturn:
        found = self._answers.find(key)
        if found is not None and found[0] != request_sha256:
            raise HTTPException(f"this {HEADER} was used for another request", status_code=422)
        if found is None or found[1] is None:
            raise HTTPException(
                f"the first request with this {HEADER} is under way, or its answer was lost; "
                f"look whether it was done, and use another key if not",
                status_code=HTTPStatus.CONFLICT,
            )
        raise AnsweredBefore(msgspec.msgpack.decode(found[1], type=KeptAnswer))
