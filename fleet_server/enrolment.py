"""Lets new devices in: makes tokens, and turns an enrolment request into a device with a certificate and its rights.

Knows the order of the checks and what is undone by none of them: a token loses a use only after everything else
about the request was found right, so that a bad CSR costs nothing. A device whose answer was lost may ask again: same
id, same key, a token that is right. Any other request for an id that is taken needs an operator who opened it. It
stops at the ports: who signs, stores and talks to the broker stands behind them; what becomes of a device later is
`membership.py`'s story.

Errors, by who must act::

    TokenRefused   the person who enrols: get a new token
    BadRequest     the device (or whoever pretends to be one)
    DeviceExists   the operator: the id is taken
    NotReady       the operator: the trust roots were not made yet
"""

import hashlib
import logging
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fleet_server.api_types import TokenCreated, TokenRequest
from fleet_server.ports import (
    Assigned,
    Authority,
    DesiredStates,
    Device,
    Director,
    ImageRepository,
    Registry,
    TokenRecord,
    Uplink,
)
from protocol.device_api import EnrolmentToken, EnrolRequest, EnrolResponse, pin_of
from protocol.names import LABEL, IllegalName, check_device_id, check_name
from protocol.release import DeviceConfig

MAX_USES = 100_000
MAX_LIFE_SECONDS = 30 * 24 * 3600  # a token is for an enrolment campaign, not for ever
MAX_LABELS = 32
_NOTHING_YET: tuple[int, tuple[Assigned, ...], DeviceConfig] = (1, (), DeviceConfig())
_log = logging.getLogger(__name__)


class TokenRefused(Exception):
    """An enrolment token is unknown, wrong, used up or expired; which of these is not told to the network."""


class DeviceExists(Exception):
    """A device of this id is enrolled already. Field: ``device``."""

    def __init__(self, device: str) -> None:
        """Name the id and the way out."""
        super().__init__(
            f"a device {device!r} is enrolled already; choose another id, "
            f"or let an operator open this one: edgewarden devices reopen {device}"
        )
        self.device = device


class BadRequest(Exception):
    """A request cannot be granted as it stands: bad id, bad CSR, bad label or number."""


class NotReady(Exception):
    """The trust roots are not there yet, so nothing that devices could verify can be signed."""

    def __init__(self) -> None:
        """Say what is missing and who makes it."""
        super().__init__("the trust roots are missing; make them once with: edgewarden keys init --dir KEYS")


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """The driver. ``random_bytes`` makes secrets; broker host and port are what devices are told."""

    registry: Registry
    authority: Authority
    director: Director
    image: ImageRepository
    desired: DesiredStates
    uplink: Uplink
    random_bytes: Callable[[int], bytes]
    broker_host: str
    broker_port: int
    on_replaced: Callable[[], None] = lambda: None  # the broker must learn which certificates count no more

    def create_token(self, request: TokenRequest, now: int) -> TokenCreated:
        """Make a token; its secret is stored only as a hash. Raises `NotReady`, `BadRequest`."""
        image_root, _ = self._roots()
        _check_token_request(request)
        token = EnrolmentToken(
            id=self.random_bytes(8).hex(),
            secret=urlsafe_b64encode(self.random_bytes(24)).decode(),
            ca_key_sha256=self.authority.ca_key_sha256(),
            image_root_sha256=pin_of(image_root),
        )
        expires_at = now + request.life_seconds * 1000
        self.registry.add_token(
            TokenRecord(
                id=token.id,
                secret_sha256=_hash_of(token.secret),
                labels=dict(request.labels),
                uses_left=request.uses,
                expires_at=expires_at,
            )
        )
        return TokenCreated(token=str(token), expires_at=expires_at)

    def enrol(self, request: EnrolRequest, now: int) -> EnrolResponse:
        """Enrol a device. Raises `NotReady`, `BadRequest`, `DeviceExists`, `TokenRefused`."""
        image_root, director_root = self._roots()
        device_id = _legal_id(request.device)
        certificate = self.authority.sign(request.csr, device_id, now)
        known = self.registry.device(device_id)
        if known is None:
            device = self._enrol_new(request, certificate, now)
        elif self._asks_again(known, certificate, now):
            self.registry.check_token(request.token_id, _hash_of(request.secret), now)
            device = known
        else:
            device = self._enrol_again(known, request, certificate, now)
        return EnrolResponse(
            certificate=device.certificate,
            ca=self.authority.ca_certificate().decode(),
            image_root=image_root,
            director_root=director_root,
            broker_host=self.broker_host,
            broker_port=self.broker_port,
            labels=device.labels,
        )

    def _enrol_new(self, request: EnrolRequest, certificate: str, now: int) -> Device:
        token = self.registry.redeem_token(request.token_id, _hash_of(request.secret), now)
        device = Device(id=request.device, labels=dict(token.labels), certificate=certificate, enrolled_at=now)
        self.registry.add_device(device)
        self._welcome(device.id, now)
        _log.info("device %s enrolled with token %s", device.id, token.id)
        return device

    def _asks_again(self, known: Device, certificate: str, now: int) -> bool:
        """Tell whether this is the device that is enrolled already: the answer to it was lost."""
        is_open = known.revoked or known.open_until > now
        return not is_open and self._key_of(known.certificate) == self._key_of(certificate)

    def _enrol_again(self, known: Device, request: EnrolRequest, certificate: str, now: int) -> Device:
        """Enrol an id that an operator opened: with a new key, what it had before counts no more."""
        if known.open_until <= now:
            raise DeviceExists(known.id)
        if self._key_of(certificate) in (self._key_of(known.certificate), self._key_of(known.next_certificate)):
            raise BadRequest(
                f"{known.id} was opened for a new key, and this is the one it had; "
                "use enroll --force, or remove the device's identity folder first"
            )
        token = self.registry.redeem_token(request.token_id, _hash_of(request.secret), now)
        labels = {**known.labels, **token.labels}
        device = Device(id=known.id, labels=labels, certificate=certificate, enrolled_at=now)
        self.registry.replace_device(device, now)
        self.uplink.expel(device.id)
        self.on_replaced()
        self._welcome(device.id, now)
        _log.warning(
            "device %s enrolled again with token %s; its old certificate counts no more", device.id, token.id
        )
        return device

    def _key_of(self, certificate: str) -> str:
        return self.authority.facts(certificate).key_sha256 if certificate else ""

    def _welcome(self, device_id: str, now: int) -> None:
        """Give the device its rights and a desired state, so that it hears something signed at once.

        A new id is wanted to run nothing yet; one that was here before, what it was wanted to run.
        """
        self.uplink.admit(device_id)
        before = self.desired.desired(device_id)
        version, assigned, config = (before.version + 1, before.assigned, before.config) if before else _NOTHING_YET
        desire = self.director.sign(device_id, version, assigned, config, now)
        self.desired.save_desired(desire)
        self.uplink.publish_desired(device_id, desire.message(self.director.roots()[1:]))

    def _roots(self) -> tuple[bytes, bytes]:
        image_root, director_roots = self.image.first_root(), self.director.roots()
        if image_root is None or not director_roots:
            raise NotReady
        return image_root, director_roots[0]


def _hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _legal_id(device: str) -> str:
    try:
        return check_device_id(device)
    except IllegalName as error:
        raise BadRequest(str(error)) from error


def _check_token_request(request: TokenRequest) -> None:
    if not 1 <= request.uses <= MAX_USES:
        raise BadRequest(f"uses: {request.uses} is not in 1…{MAX_USES}")
    if not 1 <= request.life_seconds <= MAX_LIFE_SECONDS:
        raise BadRequest(f"life_seconds: {request.life_seconds} is not in 1…{MAX_LIFE_SECONDS}")
    _check_labels(request.labels)


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise BadRequest(f"labels: {len(labels)} are over the cap of {MAX_LABELS}")
    try:
        for key, value in labels.items():
            check_name("label key", key, LABEL)
            check_name(f"label {key}", value, LABEL)
    except IllegalName as error:
        raise BadRequest(str(error)) from error
