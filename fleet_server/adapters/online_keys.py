"""Ed25519 signing keys that live on the server, one file a role (PKCS#8 PEM, 0600), made at first start.

The offline roots say which of them count; a stolen server is cured by roots that name other keys.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from fleet_server.adapters.durable import SECRET, make_private_folder, read_capped, write_atomically

S = TypeVar("S", Targets, Snapshot, Timestamp)
_MAX_PEM = 16 * 1024


class OnlineSigners:
    """The keys of some roles, by role name."""

    def __init__(self, folder: Path, roles: Sequence[str]) -> None:
        """Load each role's key from ``folder``, making what is missing."""
        make_private_folder(folder)
        self._signers = {role: _load_or_make(folder / f"{role}.pem") for role in roles}

    def sign(self, signed: S) -> bytes:
        """Return the bytes of metadata, signed with the key of its role."""
        metadata = Metadata(signed)
        metadata.sign(self._signers[signed.type])
        return metadata.to_bytes()

    def public(self) -> dict[str, bytes]:
        """Return role -> TUF key object with its id, as JSON bytes."""
        return {
            role: json.dumps({"keyid": s.public_key.keyid, **s.public_key.to_dict()}, sort_keys=True).encode()
            for role, s in self._signers.items()
        }

    def key_ids(self) -> dict[str, str]:
        """Return role -> key id."""
        return {role: signer.public_key.keyid for role, signer in self._signers.items()}


def _load_or_make(path: Path) -> CryptoSigner:
    pem = read_capped(path, _MAX_PEM)
    if pem is None:
        signer = CryptoSigner.generate_ed25519()
        write_atomically(path, signer.private_bytes, mode=SECRET)
        return signer
    return CryptoSigner(load_pem_private_key(pem, None))
