"""``edgewarden-server ca``: replaces the CA that devices pin, in steps that leave no device behind.

Each step works on the files of a server that does not run, since server and broker read certificates when they start.
Between the steps the devices must renew, which they do by themselves within a day or two; `status` says who has.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fleet_server.adapters.authority import CertificateAuthority, RotationRefused
from fleet_server.adapters.data_lock import DataLock
from fleet_server.adapters.database.opening import open_database
from fleet_server.adapters.database.registry import DatabaseRegistry
from fleet_server.config import ServerConfig
from fleet_server.ports import Device

_NAMED = 10  # devices that are named when some are missing

STEPS = ("status", "rotate", "retire")


@dataclass(frozen=True, kw_only=True)
class CaStatus:
    """Which CAs are in force, and who is not yet with the one that signs."""

    in_force: tuple[str, ...]  # key identifiers; the one that signs comes last
    devices: int  # not revoked
    waiting: tuple[str, ...]  # whose certificate in force is of another CA


def run(step: str, config: ServerConfig, *, force: bool = False) -> CaStatus:
    """Take a step and return what is so then. Raises `RotationRefused`, `DataInUse`, OSError."""
    if not (config.data / "authority").is_dir():
        raise RotationRefused(f"there is no authority in {config.data}; the server makes it when it first starts")
    with _alone_on(config, wanted=step != "status"), _opened(config) as (authority, devices):
        if step == "rotate":
            authority.make_next_ca(_now())
        if step == "retire":
            _check_all_moved(authority, devices(), force=force)
            authority.retire_ca()
        return _status_of(authority, devices())


def sentences(step: str, status: CaStatus) -> Sequence[str]:
    """Say it for people, with what to do next."""
    moved = status.devices - len(status.waiting)
    lines = [f"devices are signed by CA {status.in_force[-1]}; {moved} of {status.devices} hold its certificates"]
    if len(status.in_force) > 1:
        lines.append(f"CA {status.in_force[0]} is still in force beside it, and the server shows its certificate")
    if status.waiting:
        lines.append(f"not yet: {_names(status.waiting)}")
    lines += {
        "rotate": [
            "Start the server. Devices renew within two days; then stop it and run: edgewarden-server ca retire"
        ],
        "retire": ["Start the server. Enrolment tokens made before are worth nothing now; make new ones"],
    }.get(step, [])
    return lines


@contextmanager
def _alone_on(config: ServerConfig, *, wanted: bool) -> Iterator[None]:
    lock = DataLock(config.data) if wanted else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def _opened(config: ServerConfig) -> Iterator[tuple[CertificateAuthority, Callable[[], Sequence[Device]]]]:
    engine = open_database(config.database)
    try:
        registry = DatabaseRegistry(engine, clock=_now)
        yield (
            CertificateAuthority(config.data / "authority", hosts=config.public_hosts, now=_now(), keep_leaves=False),
            lambda: [device for device in registry.devices() if not device.revoked],
        )
    finally:
        engine.dispose()


def _check_all_moved(authority: CertificateAuthority, devices: Sequence[Device], *, force: bool) -> None:
    waiting = _status_of(authority, devices).waiting
    if waiting and not force:
        raise RotationRefused(
            f"{len(waiting)} devices hold no certificate of the next CA and would have to enrol anew: "
            f"{_names(waiting)}. Wait, revoke those that are gone, or say --force"
        )


def _status_of(authority: CertificateAuthority, devices: Sequence[Device]) -> CaStatus:
    in_force = tuple(authority.ca_ids())
    waiting = tuple(device.id for device in devices if authority.facts(device.certificate).ca != in_force[-1])
    return CaStatus(in_force=in_force, devices=len(devices), waiting=waiting)


def _names(devices: Sequence[str]) -> str:
    more = len(devices) - _NAMED
    return ", ".join(devices[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _now() -> int:
    return time.time_ns() // 1_000_000
