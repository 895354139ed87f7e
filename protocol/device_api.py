"""The HTTPS requests that devices make (port 8443): paths, bodies, authentication.

``ca`` and ``enroll`` are open (the token pins what they answer); everything else carries ``Authorization: Bearer
<JWT>`` signed with the device's key (ES256, claims ``iss`` = device id, ``aud`` = AUDIENCE, ``iat``, ``exp`` at most
MAX_TOKEN_LIFE later), so that any proxy may end TLS.
"""

import hashlib
import re

import msgspec

CA_PATH = "/device/v1/ca"  # GET -> PEM
ENROL_PATH = "/device/v1/enroll"  # POST EnrolRequest -> EnrolResponse
RENEW_PATH = "/device/v1/renew"  # GET -> Standing; POST RenewRequest -> RenewResponse
DIRECTOR_METADATA_PATH = "/device/v1/director/metadata"  # GET …/<file>
IMAGE_METADATA_PATH = "/device/v1/image/metadata"  # GET …/<file>
BUNDLES_PATH = "/device/v1/bundles"  # GET …/<sha256>, answers Range; ?from=<sha256>&method=… for a delta of it

AUDIENCE = "edgewarden-server"
MAX_TOKEN_LIFE = 120  # seconds
JWT_ALGORITHM = "ES256"
_TOKEN = re.compile(r"([0-9a-f]{8,32})\.([A-Za-z0-9_-]{16,128})\.([0-9a-f]{64})\.([0-9a-f]{64})")


class EnrolmentToken(msgspec.Struct, frozen=True, kw_only=True):
    """``id.secret.sha256(CA key).sha256(Image root v1)``: what a new device trusts before it trusts anything."""

    id: str
    secret: str
    ca_key_sha256: str  # of the CA's SubjectPublicKeyInfo, DER
    image_root_sha256: str  # of the bytes of the Image repository's 1.root.json

    def __str__(self) -> str:
        """Return the form that people carry."""
        return f"{self.id}.{self.secret}.{self.ca_key_sha256}.{self.image_root_sha256}"

    def __repr__(self) -> str:
        """Keep the secret out of logs and tracebacks."""
        return f"EnrolmentToken(id={self.id!r})"


class EnrolRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A device asks for its certificate. Sent only over TLS verified against the pinned CA."""

    token_id: str
    secret: str
    device: str
    csr: str  # PEM; CN = device


class EnrolResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What a device needs for the rest of its life."""

    certificate: str  # PEM
    ca: str  # PEM of every CA in force
    image_root: bytes  # the bytes of 1.root.json
    director_root: bytes
    broker_host: str
    broker_port: int
    labels: dict[str, str] = {}


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What the server thinks of a device that asks: it is known, and its key counts."""

    ca: str  # PEM of every CA in force; one that the device does not hold is learnt by renewing
    expires: int  # UTC ms, of the certificate in force


class RenewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A device asks for its next certificate; its token is signed with the key in force, or with the next one."""

    csr: str  # PEM; CN = device, of a fresh key


class RenewResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The next certificate. The one before counts until the device first signs with the new key."""

    certificate: str  # PEM
    ca: str  # PEM of every CA in force


class DeviceApiError(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every answer that is not 2xx."""

    error: str
    remedy: str = ""


class BadToken(ValueError):
    """An enrolment token does not have the shape id.secret.hash.hash; its text is never repeated."""


def parse_token(text: str) -> EnrolmentToken:
    """Return the parts of an enrolment token; raise `BadToken`."""
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise BadToken("the enrolment token does not have the form id.secret.sha256.sha256; copy it whole")
    return EnrolmentToken(id=match[1], secret=match[2], ca_key_sha256=match[3], image_root_sha256=match[4])


def pin_of(data: bytes) -> str:
    """Return the SHA-256 that a token carries for some bytes."""
    return hashlib.sha256(data).hexdigest()
