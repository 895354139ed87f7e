"""Hashes passwords with Argon2id; the only importer of argon2."""

import secrets
import threading

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError


class Argon2Passwords:
    """`ports.Passwords`. One at a time: each takes 64 MiB."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher()
        self._decoy = self._hasher.hash(secrets.token_hex(16))
        self._lock = threading.Lock()

    def hash(self, password: str) -> str:
        """Return the hash, with its salt and settings in it."""
        with self._lock:
            return self._hasher.hash(password)

    def is_right(self, stored: str | None, password: str) -> bool:
        """Compare in the same time whether or not there is a hash."""
        with self._lock:
            try:
                self._hasher.verify(stored or self._decoy, password)
            except (VerificationError, InvalidHashError):
                return False
        return stored is not None

    def is_outdated(self, stored: str) -> bool:
        """Whether a hash was made with other settings than today's."""
        return self._hasher.check_needs_rehash(stored)
