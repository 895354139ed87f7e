"""Which deltas are worth making, and which a device can use: from what is published, and from its birth. Pure."""

from collections.abc import Sequence

from protocol.messages import Birth
from protocol.release import NO_BASE, Release

EARLIER = 3  # versions that a new one gets deltas from before anybody asks
FACT = "deltas"  # of the birth: methods with spaces between

Published = tuple[Release, str]  # with its digest
Pair = tuple[str, str]  # base or NO_BASE, target


def pairs_for(new: Sequence[Published], known: Sequence[Published]) -> tuple[Pair, ...]:
    """Return the deltas to make for new bundles: from the newest earlier versions of a variant, then from nothing.

    The last comes last because it saves least.
    """
    patches = [
        (base, target) for release, target in new for base in _earlier(release, known)[:EARLIER] if base != target
    ]
    return (*patches, *((NO_BASE, target) for _, target in new))


def bases_of(birth: Birth | None, model: str, target: str) -> tuple[str, ...]:
    """Return what a delta to a target may start from on a device: what it says it serves, and nothing at all."""
    if birth is None:
        return ()
    serving = [m.digest for m in birth.models if m.model == model and m.digest and m.digest != target]
    return (*serving, NO_BASE)


def methods_of(birth: Birth | None) -> tuple[str, ...]:
    """Return the methods that a device says it can apply."""
    return tuple(birth.facts.get(FACT, "").split()) if birth else ()


def _earlier(release: Release, known: Sequence[Published]) -> list[str]:
    """Return digests of earlier versions of the same variant, newest first."""
    same = [
        (other.version, digest)
        for other, digest in known
        if (other.family, other.model, other.variant) == (release.family, release.model, release.variant)
        and other.version < release.version
    ]
    return [digest for _, digest in sorted(same, reverse=True)]
