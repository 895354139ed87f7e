"""The data plane's end of the channel: obeys control's orders and reports what happened.

Control decides what serves. This side loads, says `Serving` or `Refused`, and sends the difference of the statistics
once a second. When the channel closes, control is gone, and so is this process's reason to be.
"""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from agent.channel import (
    Answer,
    Channel,
    ChannelClosed,
    Drain,
    Open,
    Order,
    Ready,
    Refused,
    Serve,
    Serving,
    StatisticsDelta,
    Withdraw,
    Withdrawn,
)
from agent.inference.engine import Engine
from agent.inference.loading import CannotServe, Servable, from_folder
from runtime.interpreter import available

log = logging.getLogger(__name__)

REPORT_SECONDS = 1.0


class Orders:
    """Obeys on one thread, reports on another."""

    def __init__(
        self, channel: Channel, engine: Engine, *, on_open: Callable[[], None], on_drain: Callable[[], None]
    ) -> None:
        """``on_open`` and ``on_drain`` reach the server; both return at once."""
        self._channel = channel
        self._engine = engine
        self._on_open = on_open
        self._on_drain = on_drain
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
                self._channel.send(self._serve(order))
            case Withdraw():
                self._engine.withdraw(order.model)
                self._channel.send(Withdrawn(ticket=order.ticket, model=order.model))
            case Open():
                self._on_open()
            case Drain():
                self._on_drain()

    def _serve(self, order: Serve) -> Answer:
        try:
            flip = self._engine.serve(_ordered(order))
        except CannotServe as error:
            return Refused(ticket=order.ticket, model=order.model, reason=str(error))
        except Exception as error:  # a broken bundle must not end what serves beside it
            log.exception("loading %s %d met a fault of this agent", order.model, order.version)
            return Refused(ticket=order.ticket, model=order.model, reason=f"{type(error).__name__}: {error}")
        return Serving(
            ticket=order.ticket,
            model=order.model,
            version=order.version,
            digest=order.digest,
            runtime=flip.runtime,
            took_us=flip.took_us,
        )

    # ------------------------------------------------------------ reporting
    def _report_all(self) -> None:
        try:
            while not self._ended.wait(REPORT_SECONDS):
                self._report()
        except ChannelClosed:
            return  # the other thread ends the process

    def _report(self) -> None:
        models = self._engine.statistics.take_delta()
        truth, unknown = self._engine.truth.take_delta()
        if models or truth or unknown:
            self._channel.send(StatisticsDelta(models=models, truth=truth, unknown_truth=unknown))


def _ordered(order: Serve) -> Servable:
    """Return what the order's folder holds; raise `CannotServe` when it is not what was ordered."""
    servable = from_folder(Path(order.folder), order.digest)
    if (servable.model, servable.version) != (order.model, order.version):
        raise CannotServe(
            f"{order.model} {order.version} was ordered, the folder holds {servable.model} {servable.version}"
        )
    return servable
