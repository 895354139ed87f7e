"""The words that programs exchange about a device and its models, as string enums.

Values are explicit and never change once released: they reach disk, wire and database. What leads from one
state to the next stands in ``agent/core/deployment.py``.
"""

from enum import Enum


class DeploymentState(str, Enum):
    """Where one model's update stands on one device."""

    IDLE = "idle"  # nothing was asked of this model yet
    VERIFIED = "verified"  # both repositories agree on the target
    DOWNLOADING = "downloading"  # bytes are coming in
    STAGED = "staged"  # the whole bundle is on disk and its hash is right
    SELFTEST = "selftest"  # the trial child loads it and runs its golden samples
    SHADOW = "shadow"  # it answers live requests silently and is compared with what serves
    SWAPPING = "swapping"  # the data plane warms it beside the old one and flips
    PROBATION = "probation"  # it serves; the device may still take it back
    COMMITTED = "committed"  # it serves and stays
    ROLLING_BACK = "rolling-back"  # the device takes it back
    ROLLED_BACK = "rolled-back"  # the version before serves again
    FAILED = "failed"  # this attempt is over; a higher attempt may try again
    REJECTED = "rejected"  # the device will not run this; the reason says why
    SUPERSEDED = "superseded"  # another assignment came before this one ended


class RejectReason(str, Enum):
    """Why a device refused a desired state or a bundle. The attack or fault has a name of its own."""

    BAD_SIGNATURE = "bad-signature"  # not signed by the keys that the role requires
    REPLAYED = "replayed"  # older than what this device has already accepted
    EXPIRED = "expired"  # metadata past its life: keep serving, install nothing
    MALFORMED = "malformed"  # not metadata at all, or over a size cap
    INCOMPLETE = "incomplete"  # a part of the metadata is missing
    WRONG_DEVICE = "wrong-device"  # signed for another device
    NOT_RELEASED = "not-released"  # the Image repository does not name it
    DISAGREEMENT = "disagreement"  # the two repositories differ in length, hash or release
    BELOW_FLOOR = "below-floor"  # older than the lowest version that may run
    YANKED = "yanked"  # the release team took it back: no new install, what has it keeps it
    HASH_MISMATCH = "hash-mismatch"  # the bytes are not the signed ones
    BAD_BUNDLE = "bad-bundle"  # the container or its manifest is broken
    WRONG_RELEASE = "wrong-release"  # the manifest names another model, version or variant than was signed
    DOES_NOT_FIT = "does-not-fit"  # device class, runtime or tensor contract differ
    SELFTEST_FAILED = "selftest-failed"  # the trial child said no, crashed or ran out of its limits
    NO_SPACE = "no-space"  # the disk cannot hold it
    UNREACHABLE = "unreachable"  # the download gave up after its named number of attempts
    SWAP_FAILED = "swap-failed"  # the data plane could not take it up
    CRASHED_IN_PROBATION = "crashed-in-probation"  # the data plane died while it was on probation
    INTERRUPTED = "interrupted"  # power was lost in probation more often than allowed
    SHADOW_FAILED = "shadow-failed"  # as a shadow it answered too differently, or took the data plane down
    TOO_MANY_ERRORS = "too-many-errors"  # in probation it failed requests that the version before answered
    TOO_SLOW = "too-slow"  # in probation it took much longer than the version before
    CONFIDENCE_COLLAPSED = "confidence-collapsed"  # in probation it was much less sure than the version before
    GOLDEN_FAILED = "golden-failed"  # where it serves, its golden samples do not agree
    LOOPING = "looping"  # so many targets in a short time that something goes round in circles
    TAKEN_BACK = "taken-back"  # a person at the device took it back


class EventKind(str, Enum):
    """What an event on ``up/e`` is about."""

    DEPLOYMENT = "deployment"  # a step of the update machine
    REFUSED = "refused"  # a desired state was refused as a whole, or a command was
    DATA_PLANE = "data-plane"  # the inference process ended or came back
    SPOOL = "spool"  # reports had to be merged or dropped
    AGENT = "agent"  # the agent started, or met trouble an operator should know of
    GOVERNOR = "governor"  # the device works less hard, or harder again: heat, throttling, memory, power


class CommandOutcome(str, Enum):
    """What became of a command, as the device says in its reply. Each is the last word on it."""

    DONE = "done"  # it was carried out
    FAILED = "failed"  # it was tried, and the detail says what came of it
    REFUSED = "refused"  # well signed, and not to be carried out: the reason says why
    INTERRUPTED = "interrupted"  # the agent ended before the outcome was known; it is not tried again


class CommandState(str, Enum):
    """Where a command stands, as the fleet server sees it."""

    WAITING = "waiting"  # not answered yet
    DONE = "done"  # the device carried it out
    FAILED = "failed"  # the device tried, and the detail says what came of it
    REFUSED = "refused"  # the device will not: the reason says why
    INTERRUPTED = "interrupted"  # the agent ended before the outcome was known; it is not tried again
    EXPIRED = "expired"  # its time is over, and no answer came


class PresenceState(str, Enum):
    """What the fleet server believes of a device's connection."""

    NEW = "new"  # enrolled, never seen
    ONLINE = "online"  # connected, and reports come
    STALE = "stale"  # connected as far as is known, but silent for too long
    OFFLINE = "offline"  # said good-bye
    LOST = "lost"  # the broker published its will, and nothing came since
    REVOKED = "revoked"  # an operator cut it off


class RuntimeName(str, Enum):
    """A TFLite runtime that a device may have."""

    LITERT = "litert"
    TFLITE_RUNTIME = "tflite-runtime"


class Task(str, Enum):
    """What a model does, hence how its answers are counted."""

    CLASSIFICATION = "classification"
    OTHER = "other"  # served and timed, but answers are not counted by class
