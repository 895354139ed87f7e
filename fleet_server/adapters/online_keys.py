"""Ed25519 signing keys that live on the server, one file a role (PKCS#8 PEM, 0600), made at first start.

The offline roots say which of them count; a stolen server is cured by roots that name other keys. So there may be a
second set beside the first, ``<role>.next.pem``: made on request, and taken into use when a root names it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from fleet_server.adapters.durable import (
    SECRET,
    flush_folder,
    make_private_folder,
    read_capped,
    write_atomically,
)
from protocol.messages import CommandEnvelope, EnvelopeSignature

S = TypeVar("S", Targets, Snapshot, Timestamp)
_MAX_PEM = 16 * 1024


class OnlineSigners:
    """The keys of some roles, by role name."""

    def __init__(self, folder: Path, roles: Sequence[str]) -> None:
        """Load each role's key from ``folder``, making what is missing."""
        make_private_folder(folder)
        self._folder = folder
        self._signers = {role: _load_or_make(folder / f"{role}.pem") for role in roles}
        self._next = {role: signer for role in roles if (signer := _load(self._next_path(role)))}

    def sign(self, signed: S) -> bytes:
        """Return the bytes of metadata, signed with the key of its role."""
        metadata = Metadata(signed)
        metadata.sign(self._signers[signed.type])
        return metadata.to_bytes()

    def envelope(self, role: str, payload: bytes, payload_type: str) -> CommandEnvelope:
        """Return a payload in a DSSE envelope, signed with the key of a role."""
        envelope = Envelope(payload, payload_type, {})
        signature = envelope.sign(self._signers[role])
        return CommandEnvelope(
            payload=payload,
            payload_type=payload_type,
            signatures=(EnvelopeSignature(keyid=signature.keyid, sig=bytes.fromhex(signature.signature)),),
        )

    def public(self) -> dict[str, bytes]:
        """Return role -> TUF key object with its id, as JSON bytes: the keys that a new root should name.

        These are the next keys where there are any, else the ones in use.
        """
        return {role: _described(signer) for role, signer in (self._signers | self._next).items()}

    def accepted(self) -> dict[str, frozenset[str]]:
        """Return role -> ids of the keys that a root may name: in use, or next."""
        return {
            role: frozenset(s.public_key.keyid for s in (signer, self._next.get(role)) if s)
            for role, signer in self._signers.items()
        }

    def make_next(self) -> None:
        """Make the next keys, unless they are there and wait for a root already."""
        for role in self._signers:
            self._next[role] = _load_or_make(self._next_path(role))

    def follow(self, root: Root) -> None:
        """Take the next keys into use where the root names them. Doing it again changes nothing."""
        for role, signer in list(self._next.items()):
            if signer.public_key.keyid in root.roles[role].keyids:
                self._next_path(role).replace(self._folder / f"{role}.pem")
                flush_folder(self._folder)
                self._signers[role] = self._next.pop(role)

    def _next_path(self, role: str) -> Path:
        return self._folder / f"{role}.next.pem"


def _described(signer: CryptoSigner) -> bytes:
    key = signer.public_key
    return json.dumps({"keyid": key.keyid, **key.to_dict()}, sort_keys=True).encode()


def _load(path: Path) -> CryptoSigner | None:
    pem = read_capped(path, _MAX_PEM)
    return CryptoSigner(load_pem_private_key(pem, None)) if pem is not None else None


def _load_or_make(path: Path) -> CryptoSigner:
    signer = _load(path)
    if signer is None:
        signer = CryptoSigner.generate_ed25519()
        write_atomically(path, signer.private_bytes, mode=SECRET)
    return signer
