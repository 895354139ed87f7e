"""The data plane's end of the channel: obeys control's orders and reports what happened.

Control decides what serves. This side loads, says `Serving` or `Refused`, and sends the difference of the statistics
once a second. When the channel closes, control is gone, and so is this process's reason to be.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from agent.channel import (
    STABLE,
    Answer,
    Channel,
    ChannelClosed,
    Configure,
    Drain,
    EndShadow,
    Govern,
    Hung,
    Open,
    Opened,
    Order,
    Prepare,
    Ready,
    Refused,
    SelfTest,
    SelfTested,
    Serve,
    Serving,
    Shadow,
    ShadowDelta,
    ShadowEnded,
    Shadowing,
    StatisticsDelta,
    Withdraw,
    Withdrawn,
)
from agent.core.delegates import Delegate
from agent.inference.engine import Engine, Flip
from agent.inference.loading import CannotServe, Servable, from_folder
from agent.inference.repository import Repository
from agent.inference.selftest import self_test
from agent.inference.watchdog import Hang
from runtime.interpreter import available

log = logging.getLogger(__name__)

REPORT_SECONDS = 1.0


class Orders:
    """Obeys on one thread, reports on another."""

    def __init__(
        self,
        channel: Channel,
        engine: Engine,
        repository: Repository,
        *,
        on_open: Callable[[], None],
        on_drain: Callable[[], None],
        on_configure: Callable[[Configure], None] = lambda _: None,
        on_prepare: Callable[[Prepare], None] = lambda _: None,
    ) -> None:
        """``on_open`` and ``on_drain`` reach the server; both return at once."""
        self._channel = channel
        self._engine = engine
        self._repository = repository
        self._on_open = on_open
        self._on_drain = on_drain
        self._on_configure = on_configure
        self._on_prepare = on_prepare
        self._delegates: dict[str, Delegate] = {}
        self._ended = threading.Event()

    def start(self) -> None:
        """Say `Ready`, then obey and report in the background."""
        self._channel.send(Ready(pid=os.getpid(), runtimes=available()))
        for work, name in ((self._obey_all, "orders"), (self._report_all, "reports")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def finish(self) -> None:
        """Send the last statistics. Nothing is counted after this."""
        self._ended.set()
        try:
            self._report()
        except ChannelClosed:
            log.warning("control is gone; the last second of statistics is lost")

    def say_opened(self) -> None:
        """Clients reach this process: the one before it may go."""
        with contextlib.suppress(ChannelClosed):  # the other thread ends the process
            self._channel.send(Opened())

    def say_hung(self, hang: Hang) -> None:
        """Name the model that this process ends for."""
        one = hang.servable
        self._channel.send(Hung(model=one.model, version=one.version, digest=one.digest, seconds=hang.seconds))

    # ------------------------------------------------------------ obeying
    def _obey_all(self) -> None:
        try:
            while True:
                self._obey(self._channel.receive_order())
        except ChannelClosed:
            if not self._ended.is_set():
                os._exit(1)  # control died; whoever starts it again starts a new data plane

    def _obey(self, order: Order) -> None:
        match order:
            case Serve():
                answer = self._serve(order)
                self._tell_ended_shadows()
                self._channel.send(answer)
            case Withdraw():
                self._withdraw(order)
                self._tell_ended_shadows()
                self._channel.send(Withdrawn(ticket=order.ticket, model=order.model))
            case Prepare():
                self._on_prepare(order)
            case Configure():
                self._delegates = {delegate.name: delegate for delegate in order.delegates}
                self._on_configure(order)
            case Govern():
                self._govern(order)
            case Shadow() | EndShadow() | SelfTest():
                self._examine(order)
            case Open():
                self._on_open()
            case Drain():
                self._on_drain()

    def _govern(self, order: Govern) -> None:
        """What is quick is done at once; loading again must not keep the next order waiting."""
        self._engine.govern(order)
        log.info("works as %s", order.level.value)
        threading.Thread(target=self._rethread, name="rethread", daemon=True).start()

    def _rethread(self) -> None:
        try:
            self._engine.rethread()
        except Exception:  # what serves, serves on
            log.exception("changing the threads met a fault of this agent")

    def _serve(self, order: Serve) -> Answer:
        try:
            flip = self._flip(order)
        except CannotServe as error:
            return _refused(order, str(error))
        except Exception as error:  # a broken bundle must not end what serves beside it
            log.exception("loading %s %d met a fault of this agent", order.model, order.version)
            return _refused(order, f"{type(error).__name__}: {error}")
        return Serving(
            ticket=order.ticket,
            model=order.model,
            version=order.version,
            digest=order.digest,
            runtime=flip.runtime,
            took_us=flip.took_us,
            alias=order.alias,
            stop_start=flip.stop_start,
            without_delegate=flip.without_delegate,
        )

    def _flip(self, order: Serve) -> Flip:
        """Candidates are no business of the repository: local clients load and unload what is stable."""
        servable = _ordered(order)
        if order.runtime or order.threads or order.delegate:
            delegate = self._delegates.get(order.delegate)  # control orders only those it has configured
            self._engine.prefer(order.digest, runtime=order.runtime, threads=order.threads, delegate=delegate)
        return (
            self._repository.serve(servable) if order.alias == STABLE else self._engine.serve(servable, order.alias)
        )

    def _withdraw(self, order: Withdraw) -> None:
        if order.alias in ("", STABLE):
            self._repository.withdraw(order.model, order.alias)
        else:
            self._engine.withdraw(order.model, order.alias)

    def _examine(self, order: Shadow | EndShadow | SelfTest) -> None:
        match order:
            case Shadow():
                self._shadow(order)
            case EndShadow():
                self._end_shadow(order)
            case SelfTest():  # may take a while; orders go on
                threading.Thread(target=self._self_test, args=(order,), name="self-test", daemon=True).start()

    def _self_test(self, order: SelfTest) -> None:
        outcome = self_test(self._engine, order.model)
        answer = SelfTested(
            ticket=order.ticket,
            model=order.model,
            digest=outcome.digest,
            passed=outcome.passed,
            detail=outcome.detail,
        )
        with contextlib.suppress(ChannelClosed):  # the other thread ends the process
            self._channel.send(answer)

    # ------------------------------------------------------------ shadows
    def _shadow(self, order: Shadow) -> None:
        try:
            stable, candidate = self._engine.start_shadow(order.model, share=order.share, cpu=order.cpu)
        except CannotServe as error:
            self._channel.send(ShadowEnded(ticket=order.ticket, model=order.model, reason=str(error)))
            return
        self._tell_ended_shadows()
        digests = stable.servable.digest, candidate.servable.digest
        self._channel.send(Shadowing(ticket=order.ticket, model=order.model, stable=digests[0], candidate=digests[1]))

    def _end_shadow(self, order: EndShadow) -> None:
        self._engine.end_shadow(order.model, "as ordered")
        self._tell_ended_shadows(order.ticket)

    def _tell_ended_shadows(self, ticket: int = 0) -> None:
        ended = self._engine.take_ended_shadows()
        for one in ended:
            if one.counts is not None:
                self._channel.send(ShadowDelta(model=one.model, counts=one.counts))
            self._channel.send(ShadowEnded(ticket=ticket, model=one.model, reason=one.reason))

    # ------------------------------------------------------------ reporting
    def _report_all(self) -> None:
        try:
            while not self._ended.wait(REPORT_SECONDS):
                self._report()
        except ChannelClosed:
            return  # the other thread ends the process

    def _report(self) -> None:
        self._tell_ended_shadows()
        for model, counts in self._engine.take_shadows():
            self._channel.send(ShadowDelta(model=model, counts=counts))
        models = self._engine.statistics.take_delta()
        truth, unknown = self._engine.truth.take_delta()
        if models or truth or unknown:
            self._channel.send(StatisticsDelta(models=models, truth=truth, unknown_truth=unknown))


def _refused(order: Serve, reason: str) -> Refused:
    return Refused(ticket=order.ticket, model=order.model, reason=reason, alias=order.alias)


def _ordered(order: Serve) -> Servable:
    """Return what the order's folder holds; raise `CannotServe` when it is not what was ordered."""
    servable = from_folder(Path(order.folder), order.digest)
    if (servable.model, servable.version) != (order.model, order.version):
        raise CannotServe(
            f"{order.model} {order.version} was ordered, the folder holds {servable.model} {servable.version}"
        )
    return servable
