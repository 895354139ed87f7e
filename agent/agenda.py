"""What data planes are told: which bundles served last, which orders wait or are unanswered, which shadows run.

Keeps the supervisor's books and gives it the orders to send and the news to pass on. Knows no process, no thread and
no clock: who lives, and who is told when, is the supervisor's business.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from agent.channel import (
    CANDIDATE,
    STABLE,
    Answer,
    Configure,
    EndShadow,
    Govern,
    Order,
    Prepare,
    Refused,
    SelfTest,
    SelfTested,
    Serve,
    Serving,
    Shadow,
    ShadowEnded,
    Shadowing,
    Withdraw,
    Withdrawn,
)
from agent.core.governor import Level
from agent.ports import StoredModel
from protocol.states import RuntimeName

log = logging.getLogger(__name__)

MAX_RELOAD_DEATHS = 3  # a bundle that took this many data planes with it while being reloaded is left out
RELOADED = 0  # ticket of orders that the supervisor gives by itself
_PLANE_DIED = "the data plane ended; the candidate may be the cause"

Key = tuple[str, str]  # model, alias


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An order from the update machine; ``model`` is None to withdraw. No ``alias``: all versions."""

    ticket: int
    name: str
    model: StoredModel | None
    alias: str = STABLE

    def order(self) -> Order:
        if self.model is None:
            return Withdraw(ticket=self.ticket, model=self.name, alias=self.alias)
        return serve_order(self.ticket, self.model, self.alias)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """An order about a shadow, or a self-test."""

    ticket: int
    name: str
    wanted: Shadow | EndShadow | SelfTest

    def order(self) -> Order:
        return self.wanted


class Agenda:
    """The books of one device's data planes; used by one thread."""

    def __init__(self, configuration: Configure | None = None) -> None:
        """``configuration`` goes to every data plane first."""
        self._configuration = configuration
        self._governed: Govern | None = None  # how hard to work, as was said last
        self._serving: dict[Key, StoredModel] = {}  # what served last
        self._runtimes: dict[str, RuntimeName] = {}  # by digest: what it ran on
        self._shadows: dict[str, Shadow] = {}  # by model; they end with a data plane that dies
        self._held: list[Wanted | Compared] = []  # orders that wait until a data plane is open
        self._asked: dict[int, Wanted | Compared] = {}  # orders sent and not answered, by ticket
        self._reload_deaths: Counter[str] = Counter()  # by digest

    # ------------------------------------------------------------ what there is to do
    @property
    def serving(self) -> list[Key]:
        """Return what served last, and so what the next data plane begins with."""
        return list(self._serving)

    @property
    def is_answered(self) -> bool:
        """Tell whether no order waits for its answer."""
        return not self._asked

    @property
    def is_eased(self) -> bool:
        """Tell whether models are to work less than they could."""
        return self._governed is not None and self._governed.level is not Level.NORMAL

    @property
    def is_memory_short(self) -> bool:
        """Tell whether nothing is to be loaded that can be done without."""
        return self._governed is not None and not self._governed.measures.reload

    def first_orders(self, keys: Sequence[Key]) -> list[Order]:
        """Return what a data plane is told before it is opened."""
        settings: list[Order] = [one for one in (self._configuration, self._governed) if one is not None]
        return [*settings, *(serve_order(RELOADED, self._serving[key], key[1]) for key in keys)]

    def preparation(self) -> Prepare:
        """Return what a spare is told: what it would need if it had to step in now."""
        runtimes = {self._runtimes[one.digest] for one in self._serving.values() if one.digest in self._runtimes}
        return Prepare(runtimes=tuple(sorted(runtimes)), configuration=self._configuration or Configure())

    def moving_shadows(self) -> list[Order]:
        """Return what a successor is told, so that shadows go on in it."""
        return [msgspec.structs.replace(shadow, ticket=RELOADED) for shadow in self._shadows.values()]

    # ------------------------------------------------------------ taking orders
    def adopt(self, key: Key, model: StoredModel) -> Order:
        """Count a bundle among those that served; return the order for a data plane that lives already."""
        self._serving[key] = model
        return serve_order(RELOADED, model, key[1])

    def govern(self, order: Govern) -> bool:
        """Remember how hard every data plane that comes is to work; tell whether that is new."""
        is_new, self._governed = order != self._governed, order
        return is_new

    def hold(self, wanted: Wanted | Compared) -> None:
        """Keep an order until a data plane can take it."""
        self._held.append(wanted)

    def next_orders(self) -> list[Order]:
        """Return the orders that were held; from now on they count as asked."""
        held, self._held = self._held, []
        self._asked.update({wanted.ticket: wanted for wanted in held})
        return [wanted.order() for wanted in held]

    # ------------------------------------------------------------ hearing answers
    def hear(self, answer: Answer, *, in_office: bool) -> None:
        """Take an answer into account. ``in_office``: it comes from the data plane that serves."""
        if isinstance(answer, Serving):
            self._runtimes[answer.digest] = answer.runtime
        match answer:
            case Serving() | Refused() if answer.ticket == RELOADED:
                self._hear_reloaded(answer)
            case Serving() | Refused() | Withdrawn() | SelfTested():
                self._hear_ordered(answer)
            case Shadowing() | ShadowEnded():
                self._hear_compared(answer, in_office=in_office)

    def _hear_reloaded(self, answer: Serving | Refused) -> None:
        if isinstance(answer, Refused):
            log.error("%s served before and cannot be loaded again: %s", answer.model, answer.reason)
            self._serving.pop((answer.model, answer.alias), None)

    def _hear_ordered(self, answer: Serving | Refused | Withdrawn | SelfTested) -> None:
        wanted = self._asked.pop(answer.ticket, None)
        if not isinstance(wanted, Wanted) or isinstance(answer, Refused):
            return
        if wanted.model is None:
            self._forget(wanted)
            return
        candidate = self._serving.get((wanted.name, CANDIDATE))
        if wanted.alias == STABLE and candidate and candidate.digest == wanted.model.digest:
            del self._serving[wanted.name, CANDIDATE]  # it was promoted
        self._serving[wanted.name, wanted.alias] = wanted.model

    def _forget(self, withdrawn: Wanted) -> None:
        for alias in (STABLE, CANDIDATE) if not withdrawn.alias else (withdrawn.alias,):
            self._serving.pop((withdrawn.name, alias), None)

    def _hear_compared(self, answer: Shadowing | ShadowEnded, *, in_office: bool) -> None:
        asked = self._asked.pop(answer.ticket, None)
        if isinstance(answer, ShadowEnded):
            if in_office:  # one that drains ends what its successor goes on with
                self._shadows.pop(answer.model, None)
        elif isinstance(asked, Compared) and isinstance(asked.wanted, Shadow):
            self._shadows[answer.model] = asked.wanted

    def is_shadow_moving(self, answer: Answer, *, from_draining: bool) -> bool:
        """Tell whether this is how a shadow moves from a data plane to its successor: nobody needs to hear of it."""
        if isinstance(answer, ShadowEnded):
            return from_draining and answer.model in self._shadows
        return isinstance(answer, Shadowing) and answer.ticket == RELOADED

    # ------------------------------------------------------------ when a data plane dies
    def bury(self) -> list[Answer]:
        """Forget what died with the data plane that served; return what is to be told of it.

        An order to serve is answered by the end itself. A model whose withdrawal was ordered must not come back.
        """
        asked, self._asked = self._asked, {}
        shadows, self._shadows = self._shadows, {}
        told = [answer for wanted in asked.values() if (answer := self._died(wanted)) is not None]
        return [*told, *(ShadowEnded(ticket=RELOADED, model=model, reason=_PLANE_DIED) for model in shadows)]

    def _died(self, wanted: Wanted | Compared) -> Answer | None:
        if isinstance(wanted, Compared) and isinstance(wanted.wanted, SelfTest):
            return SelfTested(ticket=wanted.ticket, model=wanted.name, passed=None, detail=_PLANE_DIED)
        if isinstance(wanted, Compared):
            return ShadowEnded(ticket=wanted.ticket, model=wanted.name, reason=_PLANE_DIED)
        if wanted.model is not None:
            return None
        self._forget(wanted)
        return Withdrawn(ticket=wanted.ticket, model=wanted.name)

    def blame(self, suspect: Key) -> list[Answer]:
        """Count a death against a bundle: one that keeps killing must not take the others down for ever."""
        model = self._serving[suspect]
        if model.rung and model.rung.delegate:
            log.error("%s is loaded without delegate %s: a data plane died of it", suspect[0], model.rung.delegate)
            self._serving[suspect] = replace(model, rung=None)
            return []
        self._reload_deaths[model.digest] += 1
        if self._reload_deaths[model.digest] < MAX_RELOAD_DEATHS:
            return []
        del self._serving[suspect]
        reason = f"{MAX_RELOAD_DEATHS} data planes died while they loaded it"
        log.error("%s %d is left out: %s", suspect[0], model.manifest.version, reason)
        return [Refused(ticket=RELOADED, model=suspect[0], reason=reason, alias=suspect[1])]

    def absolve(self) -> None:
        """Everything that served does so again."""
        self._reload_deaths.clear()

    def end_shadows(self) -> None:
        """Let no shadow move on: the agent ends."""
        self._shadows.clear()


def serve_order(ticket: int, model: StoredModel, alias: str) -> Serve:
    """Return the order to serve a stored bundle."""
    return Serve(
        ticket=ticket,
        model=model.manifest.model,
        version=model.manifest.version,
        digest=model.digest,
        folder=model.folder,
        alias=alias,
        runtime=model.rung.runtime.value if model.rung else "",
        threads=model.rung.threads if model.rung else 0,
        delegate=model.rung.delegate if model.rung else "",
    )
