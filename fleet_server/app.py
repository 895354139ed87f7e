"""Puts the server together: the only file that makes adapters. Starts the parts in order and stops them in reverse.

The order: data, trust, broker, ingest, the connection to the broker, web, jobs. Nothing answers before what it needs
is there; and at the end nothing is written after the database is closed.
"""

import logging
import random
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import protocol
from fleet_server.access import Access, make_admin
from fleet_server.adapters.admin_password import first_password
from fleet_server.adapters.artifacts import ArtifactFolder
from fleet_server.adapters.authority import CertificateAuthority
from fleet_server.adapters.backup import refuse_unfinished
from fleet_server.adapters.broker import BrokerAddress, BrokerLink
from fleet_server.adapters.data_lock import DataLock
from fleet_server.adapters.database.accounts import DatabaseAccounts
from fleet_server.adapters.database.audit_log import DatabaseAuditLog
from fleet_server.adapters.database.commands import DatabaseCommands
from fleet_server.adapters.database.kept_answers import DatabaseKeptAnswers
from fleet_server.adapters.database.measures import FleetMeasures
from fleet_server.adapters.database.opening import open_database
from fleet_server.adapters.database.queries import Queries
from fleet_server.adapters.database.registry import DatabaseDesiredStates, DatabaseRegistry, DatabaseReleases
from fleet_server.adapters.database.retention import Retention
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.adapters.deltas import DeltaFolder
from fleet_server.adapters.director import OnlineDirector
from fleet_server.adapters.durable import make_private_folder
from fleet_server.adapters.image_repository import ImageFolder
from fleet_server.adapters.mosquitto import BrokerSettings, ManagedBroker
from fleet_server.adapters.passwords import Argon2Passwords
from fleet_server.adapters.prometheus import PrometheusExposition, Sources
from fleet_server.adapters.scheduler import Jobs
from fleet_server.commands import Commands
from fleet_server.config import ServerConfig
from fleet_server.core.offering import pairs_for
from fleet_server.core.rollups import QUARTER
from fleet_server.enrolment import Enrolment
from fleet_server.ingest import Ingest
from fleet_server.membership import Membership
from fleet_server.ports import PublishedBundle
from fleet_server.publishing import Publishing
from fleet_server.rollouts import Rollouts
from fleet_server.web.auth import Doorkeeper
from fleet_server.web.console_app import console_app
from fleet_server.web.device_app import device_app
from fleet_server.web.metrics import counted, scrape_token
from fleet_server.web.overview import role_facts, trust_warnings
from fleet_server.web.repeats import LIFE as ANSWER_LIFE
from fleet_server.web.repeats import Repeats
from fleet_server.web.services import Parts
from fleet_server.web.serving import Site, Tls, WebServer, listen

MINUTE, HOUR, DAY = 60, 3600, 86_400  # seconds
_log = logging.getLogger(__name__)


class FleetServer:
    """The whole server in one process. `start` may raise whatever a part cannot do; then nothing is left running."""

    def __init__(self, config: ServerConfig) -> None:
        """Open the data and make every part; nothing listens yet."""
        self._config = config
        self._epoch = secrets.token_hex(8)
        self._stack = ExitStack()
        with ExitStack() as opening:
            self._build(opening)
            self._stack = opening.pop_all()

    # ------------------------------------------------------------ what others want to know
    @property
    def console_url(self) -> str:
        """Where people find the console."""
        scheme = "https" if self._console.tls else "http"
        host = self._config.console.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._console.port}"

    @property
    def devices_port(self) -> int:
        """The HTTPS port of devices."""
        return self._devices.port

    @property
    def broker_port(self) -> int:
        """The MQTT port of devices."""
        return self._broker_port

    @property
    def running(self) -> bool:
        """Whether the web still serves; false means that it is time to end and say so."""
        return self._web.running

    @property
    def new_password(self) -> str | None:
        """The admin's password, when this start made the account."""
        return self._new_password

    # ------------------------------------------------------------ starting and stopping
    def start(self) -> None:
        """Start everything; on failure stop what was started."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop everything, last started first."""
        self._stack.close()

    def _start(self) -> None:
        self._publishing.catch_up(_now())
        self._deltas.start()
        self._stack.callback(self._deltas.stop)
        self._broker.start()
        self._stack.callback(self._broker.stop)
        self._link.start()
        self._stack.callback(self._link.stop)
        self._ingest.start()
        self._stack.callback(self._ingest.stop)
        self._web.start()
        self._stack.callback(self._web.stop)
        self._jobs.start()
        self._stack.callback(self._jobs.stop)

    # ------------------------------------------------------------ building
    def _build(self, opening: ExitStack) -> None:
        config = self._config
        data = make_private_folder(config.data)
        opening.callback(DataLock(data).release)
        refuse_unfinished(data)
        engine = open_database(config.database)
        opening.callback(engine.dispose)
        self._accounts = DatabaseAccounts(engine)
        self._audit = DatabaseAuditLog(engine)
        self._access = Access(
            accounts=self._accounts,
            audit=self._audit,
            passwords=Argon2Passwords(),
            random_bytes=secrets.token_bytes,
        )
        self._answers = DatabaseKeptAnswers(engine)
        self._new_password = make_admin(self._access, partial(first_password, data), _now())
        self._registry = DatabaseRegistry(engine, clock=_now)
        self._desired = DatabaseDesiredStates(engine)
        self._build_metrics(FleetMeasures(engine, clock=_now))
        self._telemetry = DatabaseTelemetry(engine, on_stored=self._exposition.passing.stored)
        self._retention = Retention(engine, kept=config.kept)
        self._queries = Queries(engine, clock=_now, kept=config.kept)
        self._command_store = DatabaseCommands(engine)
        hosts = config.public_hosts or (socket.gethostname(),)
        self._authority = CertificateAuthority(data / "authority", hosts=hosts, now=_now())
        self._director = OnlineDirector(data / "director", on_signed=self._exposition.passing.signed)
        self._image = ImageFolder(data / "image")
        self._artifacts = ArtifactFolder(data / "bundles")
        self._deltas = DeltaFolder(data / "deltas", self._artifacts)
        self._build_broker()
        self._build_drivers(DatabaseReleases(engine), hosts[0])
        self._build_web(opening)
        self._plan_jobs()

    def _build_metrics(self, measures: FleetMeasures) -> None:
        """Make what counts before those who are counted; what it asks them for it asks when somebody scrapes."""
        self._expiries: dict[str, int] = {}  # filled when the certificates of this run are known
        self._exposition = PrometheusExposition(
            Sources(
                version=protocol.__version__,
                broker_up=lambda: self._link.connected,
                ingest=lambda: self._ingest,
                measures=measures,
                roles=lambda: role_facts(self._director, self._image),
                certificates=self._expiries,
                clock=_now,
            )
        )
        self._exposition.recall()

    def _note_expiries(self) -> None:
        """Remember when the certificates end that this process has loaded: a renewed file is for the next one."""
        authority, console = self._authority, self._config.console_certificate
        files = {
            "server": authority.server_files().certificate,
            "broker": authority.broker_admin_files().certificate,
            "broker-client": authority.admin_client_files().certificate,
            **({"console": console} if console else {}),
        }
        pems = {"device-ca": authority.ca_certificate().decode()}
        pems |= {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        self._expiries.update({name: authority.facts(pem).expires_at for name, pem in pems.items()})

    def _build_broker(self) -> None:
        config = self._config
        self._broker_port = config.broker.port or _free_port()
        admin_port = config.broker_admin_port or _free_port()
        settings = BrokerSettings(
            folder=config.data / "broker",
            device_host=config.broker.host,
            device_port=self._broker_port,
            admin_port=admin_port,
            device_tls=self._authority.server_files(),
            admin_tls=self._authority.broker_admin_files(),
        )
        self._broker = ManagedBroker(settings, self._admitted, self._revocations)
        self._link = BrokerLink(
            BrokerAddress(port=admin_port, tls=self._authority.admin_client_files()),
            epoch=self._epoch,
            clock=_now,
            jitter=random.random,
            on_message=self._take,
            on_connected=self._greet_broker,
            on_desired=self._exposition.passing.published,
        )

    def _build_drivers(self, releases: DatabaseReleases, public_host: str) -> None:
        self._publishing = Publishing(
            releases=releases,
            director=self._director,
            image=self._image,
            artifacts=self._artifacts,
            on_new=partial(self._prepare_deltas, releases),
            on_director_root=self._follow_director_root,
        )
        self._rollouts = Rollouts(
            registry=self._registry,
            releases=releases,
            desired=self._desired,
            director=self._director,
            uplink=self._link,
            new_id=partial(secrets.token_hex, 6),
            deltas=self._deltas,
            hindrance=self._image.hindrance,
        )
        self._enrolment = Enrolment(
            registry=self._registry,
            authority=self._authority,
            director=self._director,
            image=self._image,
            desired=self._desired,
            uplink=self._link,
            random_bytes=secrets.token_bytes,
            broker_host=public_host,
            broker_port=self._broker_port,
            on_replaced=self._broker.refresh,
        )
        self._membership = Membership(registry=self._registry, authority=self._authority, uplink=self._link)
        self._commands = Commands(
            registry=self._registry,
            store=self._command_store,
            signer=self._director,
            uplink=self._link,
            new_id=partial(secrets.token_hex, 8),
            is_ready=lambda: bool(self._director.roots()),
        )
        self._ingest = Ingest(
            telemetry=self._telemetry,
            registry=self._registry,
            desired=self._desired,
            uplink=self._link,
            newest_root=lambda: len(self._director.roots()),
            on_birth=lambda device, birth: self._rollouts.answer_birth(device, birth, _now()),
            on_arrival=lambda device: self._commands.send_waiting(device, _now()),
            on_written=self._exposition.passing.wrote,
            on_dead=self._exposition.passing.buried,
            clock=_now,
        )

    def _build_web(self, opening: ExitStack) -> None:
        config = self._config
        parts = Parts(
            queries=self._queries,
            registry=self._registry,
            desired=self._desired,
            enrolment=self._enrolment,
            membership=self._membership,
            publishing=self._publishing,
            rollouts=self._rollouts,
            commands=self._commands,
            authority=self._authority,
            director=self._director,
            image=self._image,
            artifacts=self._artifacts,
            deltas=self._deltas,
            broker_up=lambda: self._link.connected,
            epoch=self._epoch,
            clock=_now,
            exposition=self._exposition,
            scrape_token=scrape_token(config.data),
        )
        self._note_expiries()
        answered = self._exposition.passing.answered
        tls = None
        if config.console_certificate and config.console_key:
            tls = Tls(certificate=config.console_certificate, key=config.console_key)
            tls.check()
        doorkeeper = Doorkeeper(self._access, Repeats(self._answers, _now), clock=_now, secure=tls is not None)
        console = opening.enter_context(listen(config.console.host, config.console.port))
        devices = opening.enter_context(listen(config.devices.host, config.devices.port))
        files = self._authority.server_files()
        self._console = Site(
            app=counted(console_app(parts, doorkeeper), "console", answered), listener=console, tls=tls
        )
        self._devices = Site(
            app=counted(device_app(parts), "devices", answered),
            listener=devices,
            tls=Tls(certificate=files.certificate, key=files.key),
        )
        self._web = WebServer([self._console, self._devices])

    def _plan_jobs(self) -> None:
        self._jobs = Jobs()
        for seconds, name, job in self._planned():
            self._jobs.every(seconds, name, job, at_once=True)

    def _planned(self) -> tuple[tuple[float, str, Callable[[], object]], ...]:
        return (
            (10 * MINUTE, "renew desired states", lambda: self._rollouts.renew(_now())),
            (HOUR, "renew image metadata", lambda: self._image.renew(_now())),
            (DAY, "renew certificates", self._renew_certificates),
            (DAY, "remind of expiring trust", self._remind_of_trust),
            (MINUTE, "sum up quarters of an hour", lambda: self._retention.sum_up(QUARTER)),
            (HOUR, "sum up days and forget what is old", lambda: self._retention.forget(_now())),
            (HOUR, "forget old sessions", lambda: self._accounts.forget_sessions(_now())),
            (HOUR, "forget kept answers", lambda: self._answers.forget(_now() - ANSWER_LIFE)),
            (MINUTE, "sum up refusals", lambda: self._access.note_sums(_now())),
        )

    # ------------------------------------------------------------ small errands
    def _prepare_deltas(self, releases: DatabaseReleases, new: Sequence[PublishedBundle]) -> None:
        known = [(bundle.release, bundle.sha256) for bundle in releases.bundles()]
        self._deltas.prepare(pairs_for([(bundle.release, bundle.sha256) for bundle in new], known))

    def _admitted(self) -> list[str]:
        return [device.id for device in self._registry.devices() if not device.revoked]

    def _revocations(self) -> bytes:
        return self._authority.revocation_list(self._membership.retired(_now()), _now())

    def _take(self, topic: str, payload: bytes, accept: Callable[[], None]) -> bool:
        return self._ingest.offer(topic, payload, accept)

    def _greet_broker(self) -> None:
        """After each connection: the broker may have lost rights and retained messages."""
        self._link.expel_all([device.id for device in self._registry.devices() if device.revoked])
        self._link.admit_all(self._admitted())
        self._rollouts.follow_root(_now())
        self._rollouts.republish_all()
        self._commands.send_waiting(None, _now())

    def _follow_director_root(self, now: int) -> None:
        signed = self._rollouts.follow_root(now)
        if signed:
            _log.warning("Director root %d: %d desired states signed again", len(self._director.roots()), signed)

    def _remind_of_trust(self) -> None:
        for warning in trust_warnings(self._director, self._image, _now()):
            _log.warning("%s", warning)

    def _renew_certificates(self) -> None:
        if self._authority.renew(_now()):
            _log.warning("server certificates were renewed; restart the server within 30 days to use them")


def _now() -> int:
    return time.time_ns() // 1_000_000


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
