"""The words in which people say how careful an order is: shares, spans of time, and the terms of a shadow."""

import re
from decimal import Decimal
from typing import Annotated

import typer

from protocol.release import ShadowTerms

_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9])?)\s*%?")
_SPAN = re.compile(r"([0-9]{1,6})([smh]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
_WHOLE = 1000  # per mille
_LONGEST = 7 * 86400  # seconds; longer, and the order itself would have to be signed again meanwhile
_USUAL = ShadowTerms()


def read_share(text: str) -> int:
    """Return a share such as ``20%`` or ``2.5%`` in per mille.

    >>> read_share("20%"), read_share("2.5 %"), read_share("95")
    (200, 25, 950)
    """
    match = _SHARE.fullmatch(text.strip())
    share = int(Decimal(match[1]) * 10) if match else -1
    if not 0 <= share <= _WHOLE:
        raise typer.BadParameter(f"{text!r} is not a share from 0% to 100%, by tenths of a per cent")
    return share


def read_seconds(text: str) -> int:
    """Return a span of time such as ``90s``, ``10m`` or ``2h`` in seconds.

    >>> read_seconds("90"), read_seconds("10m"), read_seconds("2h")
    (90, 600, 7200)
    """
    match = _SPAN.fullmatch(text.strip())
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 1 <= seconds <= _LONGEST:
        raise typer.BadParameter(f"{text!r} is not a time like 90s, 10m or 2h, of a week at most")
    return seconds


Share = Annotated[
    int | None,
    typer.Option(
        parser=read_share,
        metavar="SHARE",
        help="First let it answer this share of the live requests unseen, such as 20%, and compare.",
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        min=1, max=1_000_000, help=f"So many requests are compared before the verdict; {_USUAL.requests} unless said."
    ),
]
Span = Annotated[
    int | None,
    typer.Option(
        parser=read_seconds,
        metavar="TIME",
        help="The verdict comes no later, with what was compared by then; 10m unless said.",
    ),
]
Agreement = Annotated[
    int | None,
    typer.Option(
        parser=read_share,
        metavar="SHARE",
        help="This share of its answers must name the same class; 95% unless said.",
    ),
]


def shadow_terms(
    share: int | None, *, requests: int | None, seconds: int | None, agreement: int | None
) -> ShadowTerms | None:
    """Return the terms of a shadow, None where none is wanted; raise `typer.BadParameter` for terms of no shadow."""
    if share is None:
        if (requests, seconds, agreement) != (None, None, None):
            raise typer.BadParameter("these are the terms of a shadow; say which share of the requests: --shadow 20%")
        return None
    if share == 0:
        raise typer.BadParameter("a shadow of no request compares nothing", param_hint="--shadow")
    return ShadowTerms(
        share=share,
        requests=_USUAL.requests if requests is None else requests,
        seconds=_USUAL.seconds if seconds is None else seconds,
        agreement=_USUAL.agreement if agreement is None else agreement,
    )
