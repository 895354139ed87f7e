"""Why the offline signer does not sign. Each text says what must be put right; each knows its exit code."""


class CannotSign(Exception):
    """Something must be put right before this can be signed; the text says what."""

    exit_code = 1


class KeysExist(CannotSign):
    """Keys are there already; they are never written over."""


class KeysMissing(CannotSign):
    """A key or file of the key folder is not there."""


class WrongPassphrase(CannotSign):
    """The passphrase does not open a key."""


class NotTrusted(CannotSign):
    """What the server or a file shows is not what these keys signed, or is older than what was seen before."""


class NotInitialised(CannotSign):
    """The server has no trust roots yet."""


class TooFewSignatures(CannotSign):
    """Others must sign as well; the text names them."""
