"""The control process: puts the parts together and runs its main loop. The only file that constructs adapters.

Threads post to one queue; the main thread alone runs the state machines. What is decided stands in ``core/``, what is
done in the drivers; here it is only wired. The queue's items are callables that take the time (UTC ms).
"""

import logging
import os
import queue
import random
import secrets
import signal
import ssl
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from zoneinfo import ZoneInfo

from agent.adapters.allowance import Allowance
from agent.adapters.atomic_file import remove_leftovers, try_writing
from agent.adapters.command_file import CommandFile
from agent.adapters.connection_counter import ConnectionCounter
from agent.adapters.data_plane import DataPlaneProcesses
from agent.adapters.delegate_libraries import marks
from agent.adapters.delta import RebuildChild, installed_methods
from agent.adapters.deployment_file import DeploymentFile
from agent.adapters.device_api import HttpsMembership, HttpsMetadata
from agent.adapters.download import BundleDownloads
from agent.adapters.dsse import SignedCommands
from agent.adapters.history_file import HistoryFile
from agent.adapters.hold_file import HoldFile
from agent.adapters.host import MachineHost
from agent.adapters.https import HttpsServer, Mirror
from agent.adapters.identity import Identity, IdentityFolder
from agent.adapters.local_socket import LocalServer
from agent.adapters.model_store import FolderStore
from agent.adapters.mqtt import BrokerSettings, Ears, MqttUplink, Words
from agent.adapters.runtimes import installed_runtimes
from agent.adapters.scheduler import Scheduler
from agent.adapters.scratch import Scratch
from agent.adapters.sensors import MachineSensors
from agent.adapters.spool import SqliteSpool
from agent.adapters.systemd import notifier_from, watchdog_interval
from agent.adapters.threads import ThreadBackground
from agent.adapters.trial import TrialChild
from agent.adapters.trust import TufTrust
from agent.channel import (
    Answer,
    Configure,
    Hung,
    Ready,
    Refused,
    SelfTested,
    Serving,
    ShadowDelta,
    ShadowEnded,
    Shadowing,
    StatisticsDelta,
    Withdrawn,
)
from agent.chronicle import Chronicle
from agent.commanding import Commanding
from agent.config import AgentSettings, InferenceSettings, UpdateSettings, device_class
from agent.core.deployment import running_model
from agent.core.governor import Governor
from agent.core.health import HealthLimits
from agent.core.holding import parse_hours
from agent.core.merging import merge_payloads
from agent.core.retry import BackOff
from agent.core.shadowing import ShadowCounts, add, summary
from agent.core.sparing import is_wanted
from agent.core.windows import Windows
from agent.desire import Desires
from agent.disk_watch import DiskWatch
from agent.governing import Governing
from agent.listening import ListeningSockets, parse_tcp
from agent.local_api import SOCKET_NAME, LocalAnswer, LocalRequest, ModelStatus, Status, TrustStatus
from agent.local_control import LocalControl
from agent.ports import (
    EVENTS,
    TELEMETRY,
    DataPlaneExit,
    DeviceFacts,
    Refusal,
    Target,
    Trouble,
    VerifiedDesire,
    Weather,
)
from agent.renewing import Renewing
from agent.reporter import Reporter
from agent.supervisor import Supervisor
from agent.updater import Calm, Updater
from agent.verdicts import Verdicts
from protocol import __version__
from protocol.codec import CODECS, BadMessage, decode_acknowledgement, decode_server_state, encode
from protocol.messages import Birth, Farewell, RunningModel, Will
from protocol.states import DeploymentState, EventKind, RejectReason

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
MAX_TROUBLE = 300  # characters of it in a birth
DISK_REMEDY = "Check that the disk is neither full nor read-only"
POLL_SECONDS = 300.0  # how often the desired state is asked for over HTTPS while the broker is out of reach

Item = Callable[[int], None]


class Daemon:
    """All parts of one control process."""

    def __init__(self, settings: AgentSettings, *, log_level: str = "info") -> None:
        """Build everything; nothing runs before `run`. Raises `Trouble` and `CannotListen`.

        ``log_level`` is for the data plane, a process of its own.
        """
        state = Path(settings.device.state)
        self._settings = settings
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._stopping = False
        self._boot = secrets.token_hex(4)
        self._models: tuple[RunningModel, ...] = ()
        self._compared: dict[str, ShadowCounts] = {}  # by model, while a shadow runs
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self._delta_methods = installed_methods() if settings.update.deltas else ()
        self._notifier = notifier_from()
        self._credentials = IdentityFolder(state / "identity")
        self._identity = self._credentials.load()
        self._sockets = listening_sockets(settings)
        remove_leftovers(state)  # after the sockets: nobody else writes there now
        self._background = ThreadBackground(lambda done: self._post(lambda now: self._finish(done, now)))
        self._store = FolderStore(state, delegates=marks(settings.inference.delegates))
        self._host = MachineHost(state)
        self._facts = DeviceFacts(
            device_class=self._identity.settings.labels.get("class") or device_class(settings.device),
            runtimes=installed_runtimes(settings.inference.runtime),
            memory_total=self._host.read(None).memory_total or 0,
        )
        self._first_troubles: list[Trouble] = []  # what the disk refused before there was anybody to tell
        self._spool = self._open_spool()
        self._server = HttpsServer(self._identity.settings.server, tls=self._server_tls, authorise=self._bearer_token)
        self._metadata = HttpsMetadata(self._server)
        self._scratch = Scratch()
        self._trust = TufTrust(
            device=self._identity.device,
            director_root=self._identity.director_root,
            image_root=self._identity.image_root,
            folder=state / "trust",
            scratch=self._scratch.path,
            image=self._metadata.image,
            is_stored=lambda sha256: self._store.find(sha256) is not None,
        )
        self._counter = ConnectionCounter(state / "connections")
        self._uplink = self._make_uplink(settings, self._identity)
        self._reporter = Reporter(
            spool=self._spool,
            uplink=self._uplink,
            host=self._host,
            windows=Windows(_now(), settings.telemetry.window_seconds * 1000),
            now=_now,
            monotonic=time.monotonic,
            data_plane_pid=lambda: self._supervisor.pid,
            troubled=self._refused,
        )
        self._disk = DiskWatch(
            trial=lambda: try_writing(state),
            events=self._reporter,
            changed=self._tell_of_disk,
            monotonic=time.monotonic,
        )
        self._supervisor = Supervisor(
            launcher=DataPlaneProcesses(self._sockets, options=data_plane_options(settings.inference, log_level)),
            post=lambda told: self._post(lambda now: self._hear_plane(told, now)),
            configuration=configuration(settings),
            spare=is_wanted(settings.inference.spare, self._facts.memory_total),
            memory_available=self._host.memory_available,
        )
        self._governing = Governing(
            sensors=MachineSensors(settings.governor.sensor),
            governor=_governor(settings),
            plane=self._supervisor,
            events=self._reporter,
        )
        self._verdicts = Verdicts(
            plane=self._supervisor,
            monotonic=time.monotonic,
            probation_ms=settings.update.probation_seconds * 1000,
            limits=HealthLimits(
                errors=settings.update.max_errors,
                slowdown=settings.update.max_slowdown,
                unsure=settings.update.max_unsure,
            ),
        )
        history = HistoryFile(state / "history.jsonl")
        hold = HoldFile(state / "hold")
        self._deployments = DeploymentFile(state / "deployments.json")
        self._updater = Updater(
            facts=self._facts,
            deployments=self._deployments,
            store=self._store,
            downloads=self._make_downloads(settings.update, state),
            trials=_trials(settings),
            plane=self._supervisor,
            background=self._background,
            events=Chronicle(self._reporter, history, _now),
            changed=self._announce,
            random=random.random,
            monotonic=time.monotonic,
            verdicts=self._verdicts,
            calm=Calm(
                hours=tuple(parse_hours(span) for span in settings.update.hours),
                zone=ZoneInfo(settings.device.timezone),
                hold=hold.until,
            ),
            troubled=self._disk.refused,
        )
        self._control = LocalControl(
            updater=self._updater,
            store=self._store,
            history=history,
            hold=hold,
            background=self._background,
            status=self._status,
            trust=self._trust_status,
        )
        self._local: LocalServer | None = None
        self._desires = Desires(
            trust=self._trust,
            background=self._background,
            events=self._reporter,
            verified=self._pursue,
            clock=_now,
            random=random.random,
        )
        self._renewing = Renewing(
            device=self._identity.device,
            server=HttpsMembership(self._server),
            credentials=self._credentials,
            lease=lambda: self._identity.lease,
            connected=lambda: self._uplink.connected,
            renewed=self._take_identity,
            background=self._background,
            events=self._reporter,
            clock_floor=self._clock_floor,
            monotonic=time.monotonic,
            random=random.random,
        )
        self._command_file = CommandFile(state / "commands.json")
        self._commanding = Commanding(
            device=self._identity.device,
            trust=SignedCommands(self._trust.command_keys),
            memory=self._command_file,
            plane=self._supervisor,
            renewal=self._renewing,
            replies=self._reporter,
            events=self._reporter,
            clock_floor=self._clock_floor,
            monotonic=time.monotonic,
        )
        self._scheduler = Scheduler()

    # ------------------------------------------------------------ life
    def run(self) -> None:
        """Run until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._post(self._stop))
        self._start(_now())
        try:
            while not self._stopping:
                self._step(self._items.get())
        finally:
            self._end()

    def _start(self, now: int) -> None:
        log.info("agent %s of device %s starts", __version__, self._identity.device)
        if self._spool.replaced:
            self._reporter.record(kind=EventKind.SPOOL, detail=f"the spool was unreadable: {self._spool.replaced}")
        if self._trust.lost:
            self._reporter.record(kind=EventKind.AGENT, detail=f"the trust state begins anew: {self._trust.lost}")
        if self._command_file.lost:
            detail = f"old commands are forgotten: {self._command_file.lost}"
            self._reporter.record(kind=EventKind.AGENT, detail=detail)
        self._supervisor.start()
        self._updater.start(now)
        for lost in filter(None, (self._deployments.lost, self._store.lost)):
            self._reporter.record(kind=EventKind.AGENT, detail=f"{lost}; what serves is worked out from the rest")
        self._commanding.start()
        self._recall(now)
        self._uplink.start()
        self._open_local()
        for trouble in self._first_troubles:
            self._disk.refused(trouble)
        self._scheduler.every(TICK_SECONDS, "tick", lambda: self._post(self._tick))
        if self._settings.governor.enabled:
            self._scheduler.every(TICK_SECONDS, "governor", self._govern)
        self._scheduler.every(POLL_SECONDS, "poll", lambda: self._post(self._poll))
        if interval := watchdog_interval(os.environ, os.getpid()):
            # through the queue: a main loop that hangs stops the signs of life
            self._scheduler.every(interval, "watchdog", lambda: self._post(lambda _: self._notifier.alive()))
        self._notifier.ready()
        print(f"device {self._identity.device} answers on {', '.join(self._sockets.addresses())}", flush=True)  # noqa: T201 - for people who start it by hand

    def _recall(self, now: int) -> None:
        """Go on with what was wanted before this start, also without a server."""
        try:
            recalled = self._trust.recall(now)
        except (Refusal, Weather, Trouble, OSError) as error:
            self._reporter.record(kind=EventKind.AGENT, detail=f"the stored desired state cannot be used: {error}")
            return
        if recalled and recalled.expired:
            detail = "the stored desired state has expired: what serves goes on, nothing is installed"
            self._reporter.record(kind=EventKind.AGENT, reason=RejectReason.EXPIRED, detail=detail)
        elif recalled:
            self._pursue(recalled.desire)

    def _step(self, item: Item) -> None:
        try:
            item(_now())
        except Trouble as trouble:
            self._disk.refused(trouble)
        except OSError as error:
            self._disk.refused(Trouble(f"the disk is in the way: {error}", remedy=DISK_REMEDY))

    def _stop(self, now: int) -> None:
        del now
        self._stopping = True

    def _end(self) -> None:
        """Drain the data plane, keep its last statistics, say good-bye."""
        self._notifier.stopping()
        if self._local:
            self._local.close()
        self._scheduler.stop()
        self._supervisor.stop()
        while not self._items.empty():
            self._step(self._items.get())
        self._reporter.flush(_now())
        self._uplink.stop()
        self._background.stop()
        self._spool.close()
        self._server.close()
        self._sockets.close()
        self._scratch.close()
        log.info("agent ended")

    # ------------------------------------------------------------ the loop's items
    def _post(self, item: Item) -> None:
        self._items.put(item)

    def _finish(self, done: Callable[[], None], now: int) -> None:
        """Background work has ended: take its result, and what follows from it, at once."""
        done()
        self._updater.tick(now)

    def _tick(self, now: int) -> None:
        self._updater.tick(now)
        self._desires.tick(now)
        self._renewing.tick(now)
        self._reporter.tick(now)
        if self._disk.tick():
            self._open_local()
        self._settle_spool()
        self._commanding.tick()

    def _govern(self) -> None:
        """On the scheduler's thread: some sensors take their time, and the main loop must not wait for them."""
        felt = self._governing.feel(time.monotonic())
        self._post(lambda _: self._governing.decide(felt))

    def _poll(self, now: int) -> None:
        """While the broker is out of reach, ask the server over HTTPS what this device should run."""
        del now
        if self._uplink.connected:
            return

        def fetch() -> bytes | None:
            try:
                return encode(self._metadata.desired_state(self._trust.versions().director_root))
            except (Weather, Refusal) as error:
                log.info("the server cannot be asked over HTTPS either: %s", error)
                return None

        def done(payload: bytes | None) -> None:
            if payload:
                self._desires.arrived(payload, _now())

        self._background.submit("poll", fetch, done)

    def _pursue(self, desire: VerifiedDesire) -> None:
        self._reporter.set_window(desire.config.window_seconds)
        self._updater.want(desire, _now())
        self._announce()

    def _hear_plane(self, told: Answer | DataPlaneExit, now: int) -> None:
        if isinstance(told, DataPlaneExit):
            self._commanding.plane_ended(told)
        match told:
            case StatisticsDelta() | SelfTested() | Shadowing() | ShadowDelta() | ShadowEnded():
                self._hear_evidence(told)
            case Serving():
                self._updater.plane_serves(told, now)
                self._tell_of_delegate(told)
            case Refused():
                self._updater.plane_refuses(told, now)
            case Withdrawn():
                self._updater.plane_withdrew(told, now)
            case Ready():
                log.info("data plane %d is up", told.pid)
            case Hung():
                log.error("%s %d hangs", told.model, told.version)
            case DataPlaneExit(planned=False):
                why = f" ({told.detail})" if told.detail else ""
                detail = (
                    f"the data plane (pid {told.pid}) ended with code {told.returncode}{why} and is started again"
                )
                self._reporter.record(kind=EventKind.DATA_PLANE, detail=detail)
                self._updater.plane_died(now)
            case DataPlaneExit():
                log.info("data plane %d ended as planned", told.pid)
        self._updater.tick(now)

    def _hear_evidence(self, told: StatisticsDelta | SelfTested | Shadowing | ShadowDelta | ShadowEnded) -> None:
        match told:
            case StatisticsDelta():
                self._reporter.count(told)
                self._verdicts.count(told)
            case SelfTested():
                self._hear_self_test(told)
            case Shadowing() | ShadowDelta() | ShadowEnded():
                self._hear_shadow(told)

    def _hear_self_test(self, told: SelfTested) -> None:
        self._verdicts.tested(told)
        self._commanding.tested(told)
        if told.passed is False:
            detail = f"self-test failed: {told.detail}"
            self._reporter.record(
                kind=EventKind.DATA_PLANE, model=told.model, reason=RejectReason.GOLDEN_FAILED, detail=detail
            )

    def _tell_of_delegate(self, told: Serving) -> None:
        if told.without_delegate:
            detail = f"it serves without delegate {told.without_delegate}"
            self._reporter.record(kind=EventKind.DATA_PLANE, model=told.model, version=told.version, detail=detail)

    def _hear_shadow(self, told: Shadowing | ShadowDelta | ShadowEnded) -> None:
        self._verdicts.shadowed(told)
        match told:
            case Shadowing():
                self._compared.pop(told.model, None)
            case ShadowDelta():
                self._compared[told.model] = add(self._compared.get(told.model), told.counts)
            case ShadowEnded():
                detail = f"shadow ended, {told.reason}: {summary(self._compared.pop(told.model, None))}"
                self._reporter.record(kind=EventKind.DATA_PLANE, model=told.model, detail=detail)

    def _announce(self) -> None:
        """What serves has changed: the birth says so."""
        self._models = tuple(running_model(record) for record in self._updater.records())
        self._uplink.announce()
        serving = ", ".join(f"{m.model} {m.version} ({m.state.value})" for m in self._models) or "no model yet"
        self._notifier.status(serving)

    # ------------------------------------------------------------ a disk that refuses
    def _refused(self, trouble: Trouble) -> None:
        self._disk.refused(trouble)  # which tells the reporter in turn

    def _open_spool(self) -> SqliteSpool:
        """A device whose disk refuses serves and reports all the same, from memory."""
        try:
            return SqliteSpool(self._spool_file, merge=merge_payloads, limit=self._settings.telemetry.spool_bytes)
        except Trouble as trouble:
            log.error("reports are kept in memory: %s", trouble)
            self._first_troubles.append(trouble)
            return SqliteSpool(None, merge=merge_payloads, limit=self._settings.telemetry.spool_bytes)

    @property
    def _spool_file(self) -> Path:
        return Path(self._settings.device.state) / "spool.db"

    def _settle_spool(self) -> None:
        """Leave the memory for the disk, once the disk is well and the server has all that was kept in memory."""
        if not self._spool.in_memory or self._disk.trouble:
            return
        try:
            if self._spool.move_to(self._spool_file):
                self._reporter.spool_moved()
                self._uplink.announce()
        except Trouble as trouble:
            self._disk.refused(trouble)

    def _open_local(self) -> None:
        """Answer people at the device; a read-only disk has no place for the socket until it is well again."""
        if self._local:
            return
        try:
            self._local = LocalServer(Path(self._settings.device.state) / SOCKET_NAME, self._ask_locally)
            self._local.start()
        except Trouble as trouble:
            self._disk.refused(trouble)

    def _ask_locally(self, asked: LocalRequest, reply: Callable[[LocalAnswer], None]) -> None:
        self._post(lambda now: self._control.answer(asked, reply, now))

    def _tell_of_disk(self) -> None:
        """The birth says it too: an event needs the disk to get on its way."""
        self._uplink.announce()
        if self._disk.trouble:
            self._notifier.status(self._disk.trouble)

    # ------------------------------------------------------------ what people at the device ask
    def _status(self, models: tuple[ModelStatus, ...], hold_until: int) -> Status:
        return Status(
            device=self._identity.device,
            agent=__version__,
            boot=self._boot,
            connected=self._uplink.connected,
            server_up=self._uplink.connected and self._reporter.server_up,
            spooled_events=self._spool.depth(EVENTS),
            spooled_reports=self._spool.depth(TELEMETRY),
            dropped_reports=self._spool.dropped(),
            data_plane=self._supervisor.pid,
            hold_until=hold_until,
            certificate_expires=self._identity.lease.end,
            shut_out=self._renewing.shut_out,
            trouble=self._disk.trouble,
            models=models,
        )

    def _trust_status(self, now: int) -> TrustStatus:
        """Verify what is stored again, without the server."""
        recalled, problem = None, ""
        try:
            recalled = self._trust.recall(now)
        except (Refusal, Weather, Trouble) as error:
            problem = str(error)
        versions = self._trust.versions()
        targets = recalled.desire.targets if recalled else ()
        return TrustStatus(
            device=self._identity.device,
            director=versions.director,
            director_root=versions.director_root,
            image_root=versions.image_root,
            clock_floor=self._trust.clock_floor,
            expired=bool(recalled and recalled.expired),
            problem=problem,
            models=tuple(f"{target.release.model} {target.release.version}" for target in targets),
        )

    # ------------------------------------------------------------ downloads
    def _make_downloads(self, update: UpdateSettings, state: Path) -> BundleDownloads:
        return BundleDownloads(
            self._server,
            state / "downloads",
            mirrors=[Mirror(url) for url in update.mirrors],
            allowance=Allowance(
                state / "downloads.json", bandwidth=update.bandwidth, bytes_per_day=update.bytes_per_day
            ),
            rebuilds=RebuildChild() if update.deltas else None,
            base=self._stored_folder,
            memory=self._facts.memory_total,
            is_forced=lambda target: target.assignment.forced,
            spread=lambda: random.random() * update.spread_seconds,  # noqa: S311 - it spreads load, it hides nothing
            tell=lambda target, detail: self._post(lambda _: self._tell_download(target, detail)),
        )

    def _stored_folder(self, digest: str) -> str | None:
        stored = self._store.find(digest)
        return stored.folder if stored else None

    def _tell_download(self, target: Target, detail: str) -> None:
        self._notifier.status(f"{target.release.model} {target.release.version}: {detail}")
        self._reporter.record(
            kind=EventKind.DEPLOYMENT,
            model=target.release.model,
            version=target.release.version,
            digest=target.sha256,
            state=DeploymentState.DOWNLOADING,
            attempt=target.assignment.attempt,
            detail=detail,
        )

    # ------------------------------------------------------------ the uplink's ears and words
    def _make_uplink(self, settings: AgentSettings, identity: Identity) -> MqttUplink:
        return MqttUplink(
            device=identity.device,
            broker=BrokerSettings(
                host=identity.settings.broker_host,
                port=identity.settings.broker_port,
                keepalive=settings.mqtt.keepalive_seconds,
                will_delay=settings.mqtt.will_delay_seconds,
                back_off=BackOff(first=1.0, ceiling=float(settings.mqtt.reconnect_seconds)),
            ),
            tls=self._broker_tls,
            next_connection=self._counter.next,
            random=random.random,
            words=Words(birth=self._birth, will=self._will, farewell=self._farewell),
            ears=Ears(
                on_desired=lambda payload: self._post(lambda now: self._desires.arrived(payload, now)),
                on_acknowledgement=lambda payload: self._post(lambda _: self._hear_acknowledgement(payload)),
                on_command=lambda payload: self._post(lambda now: self._commanding.arrived(payload, now)),
                on_server_state=lambda payload: self._post(lambda _: self._hear_server_state(payload)),
                on_connected=lambda _: self._post(lambda _: self._reporter.connected()),
                on_disconnected=lambda reason: log.info("uplink: %s", reason),
                on_published=lambda _stream, _number: self._post(lambda _: self._reporter.publish()),
                on_unpublished=lambda _stream, _number, _why: None,  # stays unanswered, hence is sent again
                on_trouble=lambda trouble: self._post(lambda _: self._hear_uplink_trouble(trouble)),
            ),
        )

    def _hear_uplink_trouble(self, trouble: Trouble) -> None:
        self._notifier.status(str(trouble))
        self._renewing.doubt()

    def _take_identity(self) -> None:
        """A new identity lies on the disk: every connection from now on is made with it."""
        self._identity = self._credentials.load()
        self._contexts.clear()
        self._uplink.reconnect()
        self._credentials.tidy()
        self._commanding.renewed()

    def _hear_acknowledgement(self, payload: bytes) -> None:
        try:
            self._reporter.acknowledge(decode_acknowledgement(payload))
        except BadMessage as error:
            log.warning("ignored an acknowledgement: %s", error)

    def _hear_server_state(self, payload: bytes) -> None:
        try:
            self._reporter.server_state(decode_server_state(payload))
        except BadMessage as error:
            log.warning("ignored a server state: %s", error)

    def _birth(self, connection: int) -> bytes:
        trust = self._trust.versions()
        return encode(
            Birth(
                boot=self._boot,
                connection=connection,
                at=_now(),
                agent=__version__,
                device_class=self._facts.device_class,
                timezone=self._settings.device.timezone,
                runtimes=self._facts.runtimes,
                codecs=tuple(CODECS),
                spool=self._spool.id,
                director_version=trust.director,
                director_root=trust.director_root,
                image_root=trust.image_root,
                models=self._models,
                facts=self._told_facts(),
            )
        )

    def _told_facts(self) -> dict[str, str]:
        facts = {**self._host.facts(), "deltas": " ".join(self._delta_methods)}
        return {**facts, "trouble": self._disk.trouble[:MAX_TROUBLE]} if self._disk.trouble else facts

    def _will(self, connection: int) -> bytes:
        return encode(Will(boot=self._boot, connection=connection))

    def _farewell(self, connection: int) -> bytes:
        return encode(Farewell(boot=self._boot, connection=connection, at=_now()))

    # ------------------------------------------------------------ TLS on a clock that may be wrong
    def _broker_tls(self) -> ssl.SSLContext:
        return self._identity.broker_tls(check_time=self._clock_is_sane())  # new: the certificate may be renewed

    def _server_tls(self) -> ssl.SSLContext:
        """One context per state of the clock, so that connections are reused."""
        sane = self._clock_is_sane()
        if sane not in self._contexts:
            self._contexts[sane] = self._identity.server_tls(check_time=sane)
        return self._contexts[sane]

    def _bearer_token(self) -> str:
        """Return a token of the server's time, once it refused one of ours; before that of a clock not behind."""
        return self._identity.token(self._server.time_there or max(_now(), self._clock_floor()))

    def _clock_floor(self) -> int:
        """Return a time (UTC ms) that has surely passed: the Director signed then, or the CA dated our key."""
        return max(self._trust.clock_floor, self._identity.lease.start)

    def _clock_is_sane(self) -> bool:
        """A clock behind what the Director signed is wrong: the pinned CA is then checked without its dates."""
        sane = _now() >= self._clock_floor()
        if not sane:
            log.warning("the clock is behind the newest signed time; certificates are checked without their dates")
        return sane


def _now() -> int:
    return time.time_ns() // 1_000_000


def configuration(settings: AgentSettings) -> Configure:
    """Return what the data plane is told once. It comes from the local file alone: pipelines may start programs."""
    return Configure(
        pipelines=settings.pipelines,
        capture=settings.capture,
        delegates=settings.inference.delegates,
        state=settings.device.state,
    )


def data_plane_options(inference: InferenceSettings, log_level: str) -> list[str]:
    """Return the data plane's command line; raise `Trouble` for an extra that is not installed."""
    if inference.grpc and find_spec("grpc") is None:
        raise Trouble("inference.grpc is set, but gRPC is not installed", remedy="pip install 'edgewarden[grpc]'")
    options = {
        "--log-level": log_level,
        "--runtime": inference.runtime,
        "--threads": inference.threads,
        "--instances": inference.instances,
        "--queue": inference.queue,
        "--max-body": inference.max_body,
        "--invoke-seconds": inference.invoke_seconds,
        "--memory-bytes": inference.memory_bytes,
    }
    words = [str(word) for pair in options.items() for word in pair]
    if inference.grpc:
        words += ["--grpc", inference.grpc]
    flags = {
        "--feedback-on-tcp": inference.feedback_on_tcp,
        "--allow-repository-control": inference.allow_repository_control,
    }
    return [*words, *(flag for flag, is_set in flags.items() if is_set)]


def _governor(settings: AgentSettings) -> Governor:
    inference = settings.inference
    threads = None if inference.measure or inference.delegates else inference.threads
    return Governor(settings.governor, interpreters=inference.instances, threads=threads)


def _trials(settings: AgentSettings) -> TrialChild:
    """Measuring gets as much time again as the trial."""
    seconds = settings.update.trial_seconds
    delegates = settings.inference.delegates
    if not (settings.inference.measure or delegates):
        return TrialChild(runtime=settings.inference.runtime, wall_seconds=seconds)
    return TrialChild(
        runtime=settings.inference.runtime,
        wall_seconds=2 * seconds,
        ladder_seconds=seconds,
        delegates=delegates,
    )


def listening_sockets(settings: AgentSettings) -> ListeningSockets:
    """Take systemd's sockets over, or open those that are set; raise `CannotListen`."""
    if inherited := ListeningSockets.from_systemd(os.environ, os.getpid()):
        return inherited
    unix, http = settings.inference.unix, settings.inference.http
    return ListeningSockets.open(unix=Path(unix) if unix else None, tcp=parse_tcp(http) if http else None)
