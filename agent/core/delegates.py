"""Accelerators as the settings name them: a shared library that takes over parts of a model.

A delegate runs inside the process that loads the model, with all its rights, so only the device's own settings may
name one. It is never loaded first where clients are answered: whether it is worth it is measured in a child.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec

MAX_DELEGATES = 8
DELEGATE_NAME = r"^[a-z0-9][a-z0-9_-]{0,31}$"


class BadDelegate(ValueError):
    """The settings of the delegates do not belong together."""


class Delegate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each ``[[inference.delegate]]``: a TFLite external delegate."""

    name: Annotated[str, msgspec.Meta(pattern=DELEGATE_NAME)]
    library: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]  # path, or a name that the linker finds
    options: dict[str, str | int] = {}  # handed to the library as texts
    memory_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 64 * 1024 * 1024  # beside the model's, in a trial


def check_delegates(delegates: Sequence[Delegate]) -> None:
    """Raise `BadDelegate` when there are too many, or two have the same name."""
    if len(delegates) > MAX_DELEGATES:
        raise BadDelegate(f"inference.delegate: {len(delegates)} are more than {MAX_DELEGATES}")
    names = [delegate.name for delegate in delegates]
    for name in names:
        if names.count(name) > 1:
            raise BadDelegate(f"inference.delegate: two have the name {name!r}")
