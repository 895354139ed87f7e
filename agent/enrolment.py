"""A new device becomes a member of a fleet.

The token, carried by people, pins two things: the key of the server's CA and the first root of the Image repository.
So the story is: fetch the CA over TLS that nobody vouches for, compare it with the pin, and say everything else over
TLS verified against that CA. The secret leaves this device only after the comparison. What comes back is compared
again before it is stored. Every step may be repeated: the new key stays the same until its certificate is stored, and
what the device was before counts until all of the new is stored.
"""

import logging

from agent.ports import Credentials, EnrolmentServer, Trouble
from protocol.device_api import BadToken, EnrolmentToken, EnrolRequest, EnrolResponse, parse_token, pin_of
from protocol.names import IllegalName, check_device_id

log = logging.getLogger(__name__)

_INTERCEPTED = (
    "Somebody may be between this device and the server, or the token is of another server. "
    "Compare the address with where the token came from; do not go on until they agree"
)


def enrol(
    *, token: str, device: str, server: EnrolmentServer, credentials: Credentials, force: bool = False
) -> EnrolResponse:
    """Enrol this device and store what it needs; raise `Trouble` (a person must act) or `Weather` (try again)."""
    pins = _read_token(token)
    _check_device(device)
    if credentials.enrolled() and not force:
        raise Trouble(
            "this device is already enrolled",
            remedy="Say --force to enrol it anew with a new key; an operator must have opened its id for that",
        )
    ca = _pinned(server.ca(), pins, credentials)
    request = EnrolRequest(token_id=pins.id, secret=pins.secret, device=device, csr=credentials.request(device))
    response = server.enrol(request, ca)
    _pinned(response.ca, pins, credentials)
    _check_image_root(response, pins)
    credentials.accept(device, server.url, response)
    log.info("enrolled as %s at %s", device, server.url)
    return response


def _read_token(text: str) -> EnrolmentToken:
    try:
        return parse_token(text)
    except BadToken as error:
        raise Trouble(str(error), remedy="Ask the operator for a new one if it got lost") from error


def _check_device(device: str) -> None:
    try:
        check_device_id(device)
    except IllegalName as error:
        raise Trouble(str(error), remedy="Choose a lower-case name of letters, digits and hyphens") from error


def _pinned(ca: str, pins: EnrolmentToken, credentials: Credentials) -> str:
    """Return the CA that the token names, alone: whoever is in between could have put one of their own beside it."""
    pinned = credentials.pinned(ca, pins.ca_key_sha256)
    if pinned is None:
        raise Trouble("the server's CA is not the one that the token names", remedy=_INTERCEPTED)
    return pinned


def _check_image_root(response: EnrolResponse, pins: EnrolmentToken) -> None:
    if pin_of(response.image_root) != pins.image_root_sha256:
        raise Trouble("the root of the Image repository is not the one that the token names", remedy=_INTERCEPTED)
