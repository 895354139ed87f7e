"""What the web needs of the rest of the server, in one fact that `app.py` fills."""

from collections.abc import Callable
from dataclasses import dataclass, field

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from fleet_server.adapters.database.queries import Queries
from fleet_server.commands import Commands
from fleet_server.enrolment import Enrolment
from fleet_server.membership import Membership
from fleet_server.ports import (
    Artifacts,
    Authority,
    Deltas,
    DesiredStates,
    Director,
    Exposition,
    ImageRepository,
    NoDeltas,
    Registry,
)
from fleet_server.publishing import Publishing
from fleet_server.rollouts import Rollouts


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Drivers and adapters, by the names that handlers use. ``clock`` gives UTC ms."""

    queries: Queries
    registry: Registry
    desired: DesiredStates
    enrolment: Enrolment
    membership: Membership
    publishing: Publishing
    rollouts: Rollouts
    commands: Commands
    authority: Authority
    director: Director
    image: ImageRepository
    artifacts: Artifacts
    broker_up: Callable[[], bool]
    epoch: str
    clock: Callable[[], int]
    deltas: Deltas = field(default_factory=NoDeltas)
    exposition: Exposition | None = None  # None: there is no /metrics
    scrape_token: str = ""


# What handlers write as the type of their ``parts``: Litestar passes it through unchecked.
GivenParts = NamedDependency[SkipValidation[Parts]]
