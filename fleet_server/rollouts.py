"""Gives devices what they should run: orders to deploy and roll back, renewal, and publishing it all again.

A rollback is no second mechanism: it is the next desired state, pointing to an older version. Every desired state is
the full one, so the models that an order does not name are carried over as they are, with the terms of their orders.

What a version number must be above: the last one signed *and* the last one the device reports, so that a server
restored from a backup is still believed.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fleet_server.api_types import DeploymentView, DeployRequest, RollbackRequest
from fleet_server.core.history import version_before
from fleet_server.core.offering import bases_of, methods_of
from fleet_server.ports import (
    Assigned,
    Deltas,
    DeploymentRecord,
    DesiredStates,
    Device,
    Director,
    NoDeltas,
    PublishedBundle,
    Registry,
    Releases,
    SignedDesire,
    Uplink,
)
from protocol.messages import Birth
from protocol.release import Assignment, Delta, DeviceConfig, ShadowTerms

DESIRE_LIFE_MS = 7 * 24 * 3600 * 1000
RENEW_BEFORE_MS = DESIRE_LIFE_MS // 2
DELTA_PATIENCE = 3.0  # seconds that an order waits for deltas under way; later ones are for later orders
_log = logging.getLogger(__name__)


class BadOrder(Exception):
    """An order cannot be carried out as given; the operator must change it. Nothing was changed."""


class _Skip(Exception):
    """One device is left out of an order; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The driver. ``new_id`` makes ids of orders. One change of desired states at a time."""

    registry: Registry
    releases: Releases
    desired: DesiredStates
    director: Director
    uplink: Uplink
    new_id: Callable[[], str]
    hindrance: Callable[[str], str | None] = lambda _sha256: None  # why a bundle must not be newly installed
    deltas: Deltas = field(default_factory=NoDeltas)
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def deploy(self, request: DeployRequest, by: str, now: int) -> DeploymentView:
        """Order devices to run a version. Raises `BadOrder`."""
        self.deltas.settle(DELTA_PATIENCE)  # of a version that was published a moment ago
        bundles = self._installable(self._bundles_of(request.model, request.version, request.variant))
        return self._carry_out(
            _Order(kind="deploy", model=request.model, by=by, at=now, forced=request.force, shadow=request.shadow),
            self._choose(request.devices, everybody=request.all),
            lambda device: _fitting(bundles, self._birth(device)),
        )

    def rollback(self, request: RollbackRequest, by: str, now: int) -> DeploymentView:
        """Order devices back to a version, or each to the one it committed before. Raises `BadOrder`."""
        if request.to is not None:
            self._installable(self._bundles_of(request.model, request.to, None))
        elif not self.releases.bundles(request.model):
            raise BadOrder(f"no version of model {request.model!r} is published")
        return self._carry_out(
            _Order(kind="rollback", model=request.model, by=by, at=now, forced=request.force),
            self._choose(request.devices, everybody=request.all),
            lambda device: self._earlier(device, request),
        )

    def renew(self, now: int) -> int:
        """Sign again what is past half of its life; return how many."""
        renewed = 0
        for stale in self.desired.expiring(now + RENEW_BEFORE_MS):
            with self._turn:
                renewed += self._renew(stale.device, now)
        return renewed

    def follow_root(self, now: int) -> int:
        """Sign again what the newest Director root does not vouch for: the online keys changed. Return how many."""
        signed = 0
        for device in self.registry.devices():
            with self._turn:
                desire = self.desired.desired(device.id)
                if desire is not None and not device.revoked and not self.director.vouches_for(desire):
                    self._sign(device.id, desire.assigned, desire, now)
                    signed += 1
        return signed

    def republish_all(self) -> None:
        """Publish every desired state again: the broker may have lost what it retained."""
        for device in self.registry.devices():
            with self._turn:  # so that an order given meanwhile is not overtaken by what it replaces
                desire = self.desired.desired(device.id)
                if desire is not None and not device.revoked:
                    self._publish(desire)

    def answer_birth(self, device: str, birth: Birth, now: int) -> None:
        """Tell a device that came back what it should run; sign anew when it has seen newer than ours."""
        with self._turn:
            desire, owner = self.desired.desired(device), self.registry.device(device)
            if desire is None or owner is None or owner.revoked:
                return
            if birth.director_version > desire.version:
                self._sign(device, desire.assigned, desire, now)
            else:
                self._publish(desire)

    # ------------------------------------------------------------ orders
    def _carry_out(
        self, order: "_Order", devices: Sequence[Device], target: Callable[[str], PublishedBundle]
    ) -> DeploymentView:
        """Decide for all devices first, then store the order, then sign for each."""
        with self._turn:
            targets, skipped = _decide(devices, target)
            record = DeploymentRecord(
                id=self.new_id(),
                kind=order.kind,
                model=order.model,
                by=order.by,
                at=order.at,
                targets={device: bundle.release.version for device, bundle in targets.items()},
            )
            self.desired.add_deployment(record)
            for device, bundle in targets.items():
                self._assign(device, bundle, record.id, order)
        _log.info(
            "%s %s: %d devices, %d skipped (by %s)", order.kind, order.model, len(targets), len(skipped), order.by
        )
        return DeploymentView(
            id=record.id, kind=order.kind, model=order.model, targets=dict(record.targets), skipped=dict(skipped)
        )

    def _assign(self, device: str, bundle: PublishedBundle, order_id: str, order: "_Order") -> None:
        before = self.desired.desired(device)
        assignment = Assignment(
            rollout=order_id,
            attempt=1 + self._highest_attempt(device, bundle, before),
            forced=order.forced,
            shadow=order.shadow,
            deltas=self._deltas_to(bundle, self._birth(device)),
        )
        others = [a for a in _assigned(before) if a.bundle.release.model != bundle.release.model]
        assigned = sorted([*others, Assigned(bundle=bundle, assignment=assignment)], key=lambda a: a.bundle.path)
        self._sign(device, tuple(assigned), before, order.at)

    def _highest_attempt(self, device: str, bundle: PublishedBundle, before: SignedDesire | None) -> int:
        """Ask our own history, and the device when it has seen more than our history knows of."""
        known = self.desired.highest_attempt(device, bundle.sha256)
        birth = self._birth(device)
        if birth is None or birth.director_version <= _version(before):
            return known
        return max([known, *(m.attempt for m in birth.models if m.model == bundle.release.model)])

    def _deltas_to(self, bundle: PublishedBundle, birth: Birth | None) -> dict[str, Delta]:
        """Return what is ready for this device; what is not is made for those that are assigned later."""
        bases = bases_of(birth, bundle.release.model, bundle.sha256)
        self.deltas.prepare([(base, bundle.sha256) for base in bases])
        offers = {base: self.deltas.offer(base, bundle.sha256, methods_of(birth)) for base in bases}
        return {base: delta for base, delta in offers.items() if delta}

    def _earlier(self, device: str, request: RollbackRequest) -> PublishedBundle:
        version = request.to
        if version is None:
            wanted = self._wanted_version(device, request.model)
            committed = self.desired.committed_versions(device, request.model)
            hindered = self._hindered_versions(request.model)
            version = version_before([v for v in committed if v == wanted or v not in hindered], wanted)
        if version is None:
            raise _Skip(f"no earlier version of {request.model} was committed here")
        bundles = [b for b in self.releases.bundles(request.model) if b.release.version == version]
        if not bundles:
            raise _Skip(f"version {version} of {request.model} is not published")
        return _fitting(self._installable(bundles), self._birth(device))

    def _wanted_version(self, device: str, model: str) -> int | None:
        for assigned in _assigned(self.desired.desired(device)):
            if assigned.bundle.release.model == model:
                return assigned.bundle.release.version
        return None

    # ------------------------------------------------------------ signing
    def _renew(self, device: str, now: int) -> bool:
        desire, owner = self.desired.desired(device), self.registry.device(device)
        if desire is None or owner is None or owner.revoked or desire.expires_at > now + RENEW_BEFORE_MS:
            return False  # it changed while we waited for our turn
        self._sign(device, desire.assigned, desire, now)
        return True

    def _sign(
        self, device: str, assigned: tuple[Assigned, ...], before: SignedDesire | None, now: int
    ) -> SignedDesire:
        birth = self._birth(device)
        version = 1 + max(_version(before), birth.director_version if birth else 0)
        config = before.config if before else DeviceConfig()
        desire = self.director.sign(device, version, assigned, config, now)
        self.desired.save_desired(desire)
        self._publish(desire)
        return desire

    def _publish(self, desire: SignedDesire) -> None:
        birth = self._birth(desire.device)
        held = birth.director_root if birth else 1
        self.uplink.publish_desired(desire.device, desire.message(self.director.roots()[max(1, held) :]))

    # ------------------------------------------------------------ choosing
    def _choose(self, named: Sequence[str], *, everybody: bool) -> Sequence[Device]:
        if not self.director.roots():
            raise BadOrder("the trust roots are missing; make them once with: edgewarden keys init --dir KEYS")
        if bool(named) == everybody:
            raise BadOrder("name the devices, or ask for all of them; not both, not neither")
        known = {device.id: device for device in self.registry.devices()}
        unknown = sorted(set(named) - set(known))
        if unknown:
            raise BadOrder(f"no such device: {', '.join(unknown)}")
        return list(known.values()) if everybody else [known[name] for name in dict.fromkeys(named)]

    def _bundles_of(self, model: str, version: int, variant: str | None) -> Sequence[PublishedBundle]:
        published = self.releases.bundles(model)
        if not published:
            raise BadOrder(f"no version of model {model!r} is published")
        of_version = [b for b in published if b.release.version == version]
        if not of_version:
            versions = ", ".join(str(v) for v in sorted({b.release.version for b in published}))
            raise BadOrder(f"{model} has no version {version}; published are {versions}")
        chosen = [b for b in of_version if variant in (None, b.release.variant)]
        if not chosen:
            variants = ", ".join(sorted(b.release.variant for b in of_version))
            raise BadOrder(f"{model} {version} has no variant {variant!r}; published are {variants}")
        return chosen

    def _installable(self, bundles: Sequence[PublishedBundle]) -> Sequence[PublishedBundle]:
        """Return the variants that may be newly installed; raise `BadOrder` with the reason when none may."""
        reasons = [self.hindrance(bundle.sha256) for bundle in bundles]
        if all(reasons):
            raise BadOrder("; ".join(reason for reason in reasons if reason))
        return [bundle for bundle, reason in zip(bundles, reasons, strict=True) if reason is None]

    def _hindered_versions(self, model: str) -> set[int]:
        """Return the versions of which no variant may be newly installed."""
        bundles = self.releases.bundles(model)
        free = {b.release.version for b in bundles if self.hindrance(b.sha256) is None}
        return {b.release.version for b in bundles} - free

    def _birth(self, device: str) -> Birth | None:
        return self.registry.presence(device).birth


@dataclass(frozen=True, kw_only=True)
class _Order:
    kind: str
    model: str
    by: str
    at: int
    forced: bool
    shadow: ShadowTerms | None = None


def _decide(
    devices: Sequence[Device], target: Callable[[str], PublishedBundle]
) -> tuple[Mapping[str, PublishedBundle], Mapping[str, str]]:
    targets: dict[str, PublishedBundle] = {}
    skipped: dict[str, str] = {}
    for device in devices:
        try:
            if device.revoked:
                raise _Skip("the device is revoked")
            targets[device.id] = target(device.id)
        except _Skip as reason:
            skipped[device.id] = str(reason)
    return targets, skipped


def _fitting(bundles: Sequence[PublishedBundle], birth: Birth | None) -> PublishedBundle:
    """Return the first variant that the device can run, as far as its birth tells."""
    fitting = [bundle for bundle in bundles if birth is None or _fits(bundle, birth)]
    if not fitting:
        raise _Skip("no variant fits the runtimes and class that the device reports")
    return fitting[0]


def _fits(bundle: PublishedBundle, birth: Birth) -> bool:
    needs = bundle.release.needs
    if needs.device_classes and birth.device_class not in needs.device_classes:
        return False
    return not birth.runtimes or bool(set(birth.runtimes) & set(needs.runtimes))


def _assigned(desire: SignedDesire | None) -> tuple[Assigned, ...]:
    return desire.assigned if desire else ()


def _version(desire: SignedDesire | None) -> int:
    return desire.version if desire else 0
