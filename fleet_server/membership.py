"""What becomes of a device after its enrolment: its certificate is renewed, it is revoked, its id is opened again.

Knows which of a device's two certificates counts when. A renewal makes a *next* certificate; the one in force stays
in force until a request comes that the next one's key has signed. So whatever is lost on the way, and whenever either
side loses power, the device holds a key that the server takes. Expiry is not how a device is shut out (that is
`revoke`, which the database knows at every request), so a certificate that has expired may still be renewed, and
nothing else: a device that lay on a shelf for two years comes back by itself.

Errors: `UnknownDevice` (the operator: another name), `enrolment.BadRequest` (the device).
"""

import logging
from dataclasses import dataclass

from fleet_server.enrolment import BadRequest
from fleet_server.ports import Authority, Device, Registry, Uplink
from protocol.device_api import RenewRequest, RenewResponse, Standing

MAX_OPEN_SECONDS = 30 * 24 * 3600  # as long as a token lives at most
_log = logging.getLogger(__name__)


class UnknownDevice(Exception):
    """No device of this id is enrolled."""

    def __init__(self, device: str) -> None:
        """Name it, and what is possible all the same."""
        super().__init__(f"there is no device {device[:80]!r}; a new id needs no opening, only an enrolment token")


@dataclass(frozen=True, kw_only=True)
class Membership:
    """The driver."""

    registry: Registry
    authority: Authority
    uplink: Uplink

    # ------------------------------------------------------------ by the device
    def standing(self, device_id: str) -> Standing:
        """Tell a device that its key was recognised, and what it should hold. Raises `UnknownDevice`."""
        device = self._device(device_id)
        expires = self.authority.facts(device.certificate).expires_at
        return Standing(ca=self.authority.ca_certificate().decode(), expires=expires)

    def renew(self, device_id: str, request: RenewRequest, now: int) -> RenewResponse:
        """Issue the next certificate. Raises `UnknownDevice`, `BadRequest`."""
        device = self._device(device_id)
        certificate = self.authority.sign(request.csr, device_id, now)
        if self._key_of(certificate) == self._key_of(device.certificate):
            raise BadRequest("a renewal is for a fresh key, and this is the one in force")
        self.registry.offer_certificate(device_id, certificate, now)
        _log.info("device %s has its next certificate", device_id)
        return RenewResponse(certificate=certificate, ca=self.authority.ca_certificate().decode())

    def has_used_next(self, device: Device, now: int) -> None:
        """Put the next certificate of a device in force, since its key has signed a request."""
        self.registry.promote(device.id, device.next_certificate, now)
        _log.info("device %s uses its next certificate; the one before counts no more", device.id)

    def has_expired(self, certificate: str, now: int) -> bool:
        """Tell whether a certificate's days are over by the server's clock."""
        return self.authority.facts(certificate).expires_at <= now

    # ------------------------------------------------------------ by the operator
    def revoke(self, device_id: str, by: str, now: int) -> bool:
        """Shut a device out; return whether the broker has done so already. Raises `UnknownDevice`.

        The database comes first: from then on HTTPS refuses it, and what it still says over MQTT is not stored.
        """
        self._device(device_id)
        self.registry.revoke(device_id, now)
        cut = self.uplink.expel(device_id)
        _log.warning("device %s was revoked by %s", device_id, by)
        return cut

    def reopen(self, device_id: str, seconds: int, by: str, now: int) -> int:
        """Let an id enrol again, once; return until when. Raises `UnknownDevice`, `BadRequest`."""
        if not 1 <= seconds <= MAX_OPEN_SECONDS:
            raise BadRequest(f"seconds: {seconds} is not in 1…{MAX_OPEN_SECONDS}")
        self._device(device_id)
        until = now + seconds * 1000
        self.registry.reopen(device_id, until)
        _log.warning("device %s was opened for a new enrolment by %s, for %d s", device_id, by, seconds)
        return until

    # ------------------------------------------------------------ for the broker
    def retired(self, now: int) -> list[str]:
        """Return certificates that count no more though they have not expired; forget those that have."""
        retired = self.registry.retired()
        expired = [certificate for certificate in retired if self.has_expired(certificate, now)]
        if expired:
            self.registry.forget_retired(expired)
        return [certificate for certificate in retired if certificate not in set(expired)]

    def _device(self, device_id: str) -> Device:
        device = self.registry.device(device_id)
        if device is None:
            raise UnknownDevice(device_id)
        return device

    def _key_of(self, certificate: str) -> str:
        return self.authority.facts(certificate).key_sha256
