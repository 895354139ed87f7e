"""Gathers what a new version shows, as a shadow and on probation, and hears core's verdict on it.

Keeps counts only, in memory: after a restart of the agent a shadow or a probation begins anew. What a verdict means
for the update is the machine's business (`core/deployment.py`), how it is reached `core/health.py`'s and
`core/shadowing.py`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass

from agent.channel import SelfTested, Serving, Shadow, ShadowDelta, ShadowEnded, Shadowing, StatisticsDelta
from agent.core import health, shadowing
from agent.core.deployment import Deployment, Event, Happened
from agent.core.health import GoldenRun, HealthLimits, Probation, Verdict
from agent.core.recent import Recent, added
from agent.ports import DataPlane
from protocol.names import short_digest
from protocol.states import DeploymentState, RejectReason
from protocol.statistics import ModelStatistics


@dataclass(kw_only=True)
class _Watched:
    """A model on probation, as far as it has shown."""

    ticket: int
    digest: str
    since: float  # monotonic
    statistics: ModelStatistics | None = None
    golden: GoldenRun | None = None
    golden_asked: bool = False


@dataclass(kw_only=True)
class _Compared:
    """A candidate in the shadow of what serves."""

    ticket: int
    since: float | None = None  # monotonic; None: not yet
    counts: shadowing.ShadowCounts | None = None
    impossible: str = ""  # why it cannot be compared


class Verdicts:
    """The evidence on every model whose new version has still to prove itself."""

    def __init__(
        self, *, plane: DataPlane, monotonic: Callable[[], float], probation_ms: int, limits: HealthLimits
    ) -> None:
        """``monotonic`` returns seconds that never jump."""
        self._plane = plane
        self._monotonic = monotonic
        self._probation_ms = probation_ms
        self._limits = limits
        self._recent: dict[str, Recent] = {}  # by short digest
        self._watched: dict[str, _Watched] = {}  # by model
        self._compared: dict[str, _Compared] = {}  # by model

    # ------------------------------------------------------------ beginning and ending
    def watch(self, record: Deployment, ticket: int) -> None:
        """Begin a probation, anew after a crash: what was counted before it says little of what runs now."""
        assert record.serving is not None  # the table enters PROBATION with a version that serves
        self._watched[record.model] = _Watched(ticket=ticket, digest=record.serving.digest, since=self._monotonic())

    def compare(self, record: Deployment, ticket: int) -> None:
        """Begin a shadow: the data plane is loading the candidate."""
        self._compared[record.model] = _Compared(ticket=ticket)

    def forget(self, model: str) -> None:
        """Both have ended."""
        self._watched.pop(model, None)
        self._compared.pop(model, None)

    def keep_only(self, digests: set[str]) -> None:
        """Forget what versions did that are no longer on this device."""
        kept = {short_digest(digest) for digest in digests}
        self._recent = {digest: recent for digest, recent in self._recent.items() if digest in kept}

    # ------------------------------------------------------------ evidence
    def count(self, delta: StatisticsDelta) -> None:
        """Take what the data plane counted."""
        at = self._monotonic()
        for statistics in delta.models:
            self._recent.setdefault(statistics.digest, Recent()).add(statistics, at)
            for watched in self._watched.values():
                if short_digest(watched.digest) == statistics.digest:
                    watched.statistics = added(watched.statistics, statistics)

    def candidate_serves(self, answer: Serving, record: Deployment) -> None:
        """The candidate is loaded: let it answer its share."""
        terms = record.target.assignment.shadow if record.target else None
        if terms is not None:
            self._plane.shadow(Shadow(ticket=answer.ticket, model=answer.model, share=terms.share / 1000))

    def candidate_refused(self, model: str, why: str) -> None:
        """The data plane cannot load the candidate beside what serves."""
        if compared := self._compared.get(model):
            compared.impossible = why

    def shadowed(self, told: Shadowing | ShadowDelta | ShadowEnded) -> None:
        """A shadow began, counted, or ended by itself: then the candidate cannot be compared."""
        compared = self._compared.get(told.model)
        if compared is None:
            return
        match told:
            case Shadowing(ticket=ticket) if ticket == compared.ticket:
                compared.since = self._monotonic()
            case ShadowDelta() if compared.since is not None:
                compared.counts = shadowing.add(compared.counts, told.counts)
            case ShadowEnded(ticket=ticket) if ticket == compared.ticket or compared.since is not None:
                compared.impossible = told.reason

    def tested(self, answer: SelfTested) -> None:
        """The golden samples were run where a model serves."""
        watched = self._watched.get(answer.model)
        if watched is None or watched.ticket != answer.ticket:
            return
        if answer.passed is None:
            watched.golden_asked = False
        elif watched.digest == answer.digest:
            watched.golden = GoldenRun(passed=answer.passed, detail=answer.detail)

    # ------------------------------------------------------------ verdicts
    def judge(self, record: Deployment) -> Happened | None:
        """Return what the evidence says happened to a model, or None while it says nothing."""
        if record.state is DeploymentState.SHADOW:
            return self._judge_shadow(record)
        if record.state is DeploymentState.PROBATION:
            return self._judge_probation(record)
        return None

    def _judge_shadow(self, record: Deployment) -> Happened | None:
        compared = self._compared.get(record.model)
        terms = record.target.assignment.shadow if record.target else None
        if compared is None or terms is None:
            return None
        if compared.impossible:
            return _settled(shadowing.refuse(compared.impossible))
        if compared.since is None:
            return None
        elapsed = int((self._monotonic() - compared.since) * 1000)
        verdict = shadowing.judge(compared.counts, terms, elapsed)
        return _settled(verdict) if verdict else None

    def _judge_probation(self, record: Deployment) -> Happened | None:
        watched = self._watched.get(record.model)
        if watched is None:
            return None
        finding = health.judge(self._probation_of(record, watched), self._limits)
        match finding.verdict:
            case Verdict.RUN_GOLDEN if not watched.golden_asked:
                watched.golden_asked = True
                self._plane.self_test(watched.ticket, record.model)
            case Verdict.HEALTHY:
                return Happened(event=Event.SURVIVED, detail=finding.detail)
            case Verdict.SICK:
                return Happened(event=Event.SICKENED, reason=finding.reason, detail=finding.detail)
        return None

    def _probation_of(self, record: Deployment, watched: _Watched) -> Probation:
        before = record.committed if record.committed != record.serving else None
        recent = self._recent.get(short_digest(before.digest)) if before else None
        return Probation(
            elapsed_ms=int((self._monotonic() - watched.since) * 1000),
            length_ms=self._probation_ms,
            before=recent.statistics if recent else None,
            now=watched.statistics,
            golden=watched.golden,
        )


def _settled(verdict: shadowing.Comparison) -> Happened:
    if verdict.agreed:
        return Happened(event=Event.AGREED, detail=verdict.detail)
    return Happened(event=Event.DIFFERS, reason=RejectReason.SHADOW_FAILED, detail=verdict.detail)
