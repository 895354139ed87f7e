"""``python -m agent.inference``: the data plane. Wires its parts; alone here are they built.

Without arguments it is control's child: sockets and channel come by descriptor, control says what to serve. With
``serve`` it is a server of its own, unmanaged: for development, benchmarks, and people who want just that.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent.channel import CHANNEL_FD, EXIT_HUNG, LISTEN_FDS, Channel, ChannelClosed
from agent.core.delegates import Delegate
from agent.inference.configured import Configured
from agent.inference.engine import Engine
from agent.inference.http import Limits
from agent.inference.kernel import die_with_parent, limit_memory, memory_available
from agent.inference.loading import CannotServe, Settings
from agent.inference.orders import Orders
from agent.inference.repository import FLEET_DECIDES, Repository
from agent.inference.routes import Routes
from agent.inference.server import Beside, Server
from agent.inference.service import Service
from agent.inference.spare import Waiting
from agent.inference.statistics import Statistics
from agent.inference.truth import TruthRing
from agent.inference.watchdog import INVOKE_SECONDS, Hang, Watchdog
from agent.listening import CannotListen, ListeningSockets, inherited_descriptors, parse_tcp
from runtime.interpreter import AUTO, RuntimeMissing, import_runtime

# What control's child does not need is imported by the modes that do: its start is what clients wait for.
if TYPE_CHECKING:
    from agent.config import AgentSettings
    from agent.inference.grpc_server.server import GrpcServer

log = logging.getLogger(__name__)

A_MODEL = "bundle folder, .ewb or .tflite"
SERVE_DOES = "serve models without a fleet"
SERVE_EXIT_CODES = "Exit codes: 0 after SIGTERM or Ctrl-C, 2 wrong usage, or a model or an address cannot be served."
BENCH_DOES = "measure a model on every runtime and number of threads here"
BENCH_EXIT_CODES = "Exit codes: 0 done, 1 no runtime can run the model, 2 wrong usage, or no such model."
DEFAULT_CONFIG = "/etc/edgewarden/agent.toml"
DEFAULT_HTTP = "127.0.0.1:8000"  # the port that Triton's clients try
EXIT_USAGE = 2
LAST_ANSWERS_SECONDS = 1.0  # a process that ends for a model that hangs gives the others this long
SEND_SECONDS = 0.05  # for the last of them to reach its socket
STACK_BYTES = 1024 * 1024  # of a client's thread: the default of 8 MiB would count against the memory limit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; return the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    if options.mode == "bench":
        return _bench(options)
    if options.mode == "serve":
        return _serve_unmanaged(options)
    if CHANNEL_FD not in os.environ:
        _parser().error("the agent starts this by itself; to serve models without a fleet, say: serve BUNDLE")
    return _serve_managed(options)


def _parser() -> argparse.ArgumentParser:
    # People reach it as edgewarden-agent, which hands these two modes on.
    parser = argparse.ArgumentParser(prog="edgewarden-agent", description="Serves TFLite models.")
    levels = ["debug", "info", "warning", "error"]
    parser.add_argument("--log-level", default="info", choices=levels, help="how much is said on stderr")
    _add_limits(parser)
    parser.add_argument(
        "--allow-repository-control",
        action="store_true",
        help="local clients may load and unload what the fleet manages",
    )
    modes = parser.add_subparsers(dest="mode")
    bench_parser = modes.add_parser("bench", description=BENCH_DOES, help=BENCH_DOES, epilog=BENCH_EXIT_CODES)
    bench_parser.add_argument("model", type=Path, metavar="BUNDLE_OR_TFLITE", help=A_MODEL)
    bench_parser.add_argument("--json", action="store_true", help="the table as JSON")
    bench_parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"take [[inference.delegate]] of an agent.toml (default: {DEFAULT_CONFIG}, if there is one)",
    )
    serve = modes.add_parser("serve", description=SERVE_DOES, help=SERVE_DOES, epilog=SERVE_EXIT_CODES)
    _add_limits(serve)
    serve.add_argument("--config", type=Path, metavar="FILE", help="take [[pipeline]] and [capture] of an agent.toml")
    serve.add_argument("models", nargs="+", type=Path, metavar="BUNDLE_OR_TFLITE", help=A_MODEL)
    serve.add_argument("--unix", type=Path, metavar="PATH", help="listen on a Unix socket")
    serve.add_argument("--http", metavar="HOST:PORT", help=f"listen on loopback TCP (default {DEFAULT_HTTP})")
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime", default=AUTO, help="auto, litert or tflite-runtime")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of one interpreter")
    parser.add_argument("--instances", type=_positive, default=1, help="interpreters of each model")
    hidden = argparse.SUPPRESS  # its name until it was called as in agent.toml
    parser.add_argument("--workers", dest="instances", type=_positive, default=hidden, help=hidden)
    parser.add_argument("--queue", type=_positive, default=64, help="requests that may wait for a model")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="answer gRPC on loopback TCP too; needs the extra grpc")
    parser.add_argument("--max-body", type=_positive, default=Limits().body_bytes, help="largest request, in bytes")
    parser.add_argument(
        "--invoke-seconds", type=float, default=INVOKE_SECONDS, help="a model that takes longer hangs"
    )
    parser.add_argument(
        "--memory-bytes", type=_bytes, default=0, help="what may be taken beside the runtime's own; 0: all"
    )
    parser.add_argument("--feedback-on-tcp", action="store_true", help="take feedback on TCP too, not only on Unix")


def _bytes(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


# ---------------------------------------------------------------- building
def _engine(options: argparse.Namespace) -> Engine:
    return Engine(
        settings=Settings(runtime=options.runtime, threads=options.threads, instances=options.instances),
        statistics=Statistics(),
        truth=TruthRing(),
        now_ms=lambda: time.time_ns() // 1_000_000,
        queue_limit=options.queue,
        watchdog=Watchdog(options.invoke_seconds),
        memory_available=memory_available,
    )


def _limit_memory(options: argparse.Namespace) -> None:
    """Limit what models and requests may take; the runtime's own code is imported before."""
    if not options.memory_bytes:
        return
    with contextlib.suppress(RuntimeMissing, ValueError):  # the first model that is loaded says it better
        import_runtime(options.runtime)
    threading.stack_size(STACK_BYTES)
    limit_memory(options.memory_bytes)


@contextlib.contextmanager
def _within(memory_bytes: int) -> Iterator[None]:
    """Raise `CannotServe` where a memory limit does not even allow to begin: no room for a model, or for a thread."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_bytes:
            raise
        why = str(error) or "out of memory"
        raise CannotServe(
            f"--memory-bytes {memory_bytes} is too little to serve anything ({why}); allow more, or 0 for no limit"
        ) from error


def _server(
    sockets: ListeningSockets,
    engine: Engine,
    service: Service,
    options: argparse.Namespace,
    *,
    managed: bool,
    beside: Beside | None,
    configured: Configured,
) -> Server:
    routes = Routes(
        engine,
        managed=managed,
        feedback_on_tcp=options.feedback_on_tcp,
        body_cap=options.max_body,
        service=service,
    )
    routes.add(configured)
    return Server(sockets, routes, Limits(body_bytes=options.max_body), beside=beside)


def _grpc(service: Service, options: argparse.Namespace, *, shared: bool) -> "GrpcServer | None":
    """Return the gRPC side, if it is wanted; raise `CannotListen`."""
    if not options.grpc:
        return None
    try:
        from agent.inference.grpc_server.server import GrpcServer
    except ImportError as error:
        raise CannotListen(f"gRPC needs the extra 'grpc': pip install 'edgewarden[grpc]' ({error})") from error
    host, port = parse_tcp(options.grpc)
    return GrpcServer(service, host, port, max_body=options.max_body, shared=shared)


def _open(server: Server, configured: Configured, waiting: Waiting | None = None) -> None:
    if waiting is not None:
        waiting.step_in()
    server.open()
    configured.start()


def _drain(server: Server, configured: Configured) -> None:
    configured.stop_soon()
    server.drain()


def _bench(options: argparse.Namespace) -> int:
    from agent.inference.ladder import bench
    from protocol.settings import BadSettings

    try:
        delegates = _delegates(options.config)
        return bench(options.model, as_json=options.json, cores=os.cpu_count() or 1, delegates=delegates)
    except (BadSettings, CannotServe) as error:
        print(f"edgewarden: {error}", file=sys.stderr)  # noqa: T201 - a command says why it stops
        return EXIT_USAGE


def _delegates(config: Path | None) -> tuple[Delegate, ...]:
    """Return those of a settings file, which is the agent's where there is one and none is given."""
    file = config or Path(DEFAULT_CONFIG)
    if config is None and not os.access(file, os.R_OK):
        return ()
    return _settings(file).inference.delegates


def _settings(file: Path) -> "AgentSettings":
    from agent.config import load_settings

    return load_settings(file)


# ---------------------------------------------------------------- control's child
def _serve_managed(options: argparse.Namespace) -> int:
    die_with_parent(os.environ)
    channel = Channel(socket.socket(fileno=int(os.environ[CHANNEL_FD])))
    sockets = ListeningSockets.inherited(inherited_descriptors(os.environ, LISTEN_FDS))
    engine = _engine(options)
    repository = Repository(engine, forbidden="" if options.allow_repository_control else FLEET_DECIDES)
    service = Service(engine, repository)
    configured = Configured(engine)
    beside = _grpc_or_none(service, options)
    server = _server(sockets, engine, service, options, managed=True, beside=beside, configured=configured)
    waiting = Waiting()
    orders = Orders(
        channel,
        engine,
        repository,
        on_prepare=waiting.prepare,
        on_configure=configured.configure,
        on_open=lambda: _open(server, configured, waiting),
        on_drain=lambda: _drain(server, configured),
    )
    server.on_opened = orders.say_opened
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in a terminal reaches control, which drains this process
    signal.signal(signal.SIGTERM, lambda *_: _drain(server, configured))
    try:
        with _within(options.memory_bytes):
            _limit_memory(options)
            engine.watchdog.start(lambda hang: _end_for(hang, engine, server, orders))
            orders.start()
    except CannotServe as error:
        log.critical("%s", error)
        return EXIT_USAGE
    server.run()
    configured.finish()
    engine.close()
    orders.finish()
    return 0


def _grpc_or_none(service: Service, options: argparse.Namespace) -> "GrpcServer | None":
    """Return the gRPC side, if it can be had: without it, HTTP serves on."""
    try:
        return _grpc(service, options, shared=True)
    except CannotListen as error:
        log.error("%s; gRPC is not served", error)
        return None


# ---------------------------------------------------------------- a model that hangs
def _end_for(hang: Hang, engine: Engine, server: Server, orders: Orders | None = None) -> None:
    """End this process, for an invoke cannot be ended; first answer whom other models can answer, and say why."""
    one = hang.servable
    log.critical("%s %d hangs: one invoke took more than %g s", one.model, one.version, hang.seconds)
    server.drain()
    engine.give_up(one)
    deadline = time.monotonic() + LAST_ANSWERS_SECONDS
    stuck = sum(found.waiting for found in engine.all() if found.servable.digest == one.digest)
    while time.monotonic() < deadline and server.busy > stuck:
        time.sleep(0.01)
    time.sleep(SEND_SECONDS)
    if orders:
        with contextlib.suppress(ChannelClosed):
            orders.say_hung(hang)
        orders.finish()
    os._exit(EXIT_HUNG)


# ---------------------------------------------------------------- on its own
def _serve_unmanaged(options: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    from protocol.settings import BadSettings

    try:
        with TemporaryDirectory(prefix="edgewarden-serve-") as scratch:
            return _serve_models(options, Path(scratch))
    except (CannotServe, CannotListen, BadSettings) as error:
        print(f"edgewarden: {error}", file=sys.stderr)  # noqa: T201 - a command says why it stops
        return EXIT_USAGE


def _serve_models(options: argparse.Namespace, scratch: Path) -> int:
    from agent.inference.unmanaged import Argument, greeting

    arguments = [Argument(path, scratch) for path in options.models]
    names = [argument.servable.model for argument in arguments]
    if len(set(names)) != len(names):
        raise CannotServe(f"two of the given models have the same name: {', '.join(sorted(names))}")
    http = options.http or (None if options.unix else DEFAULT_HTTP)
    sockets = ListeningSockets.open(unix=options.unix, tcp=parse_tcp(http) if http else None)
    engine = _engine(options)
    repository = Repository(engine)
    configured = Configured(engine)
    try:
        _configure_alone(configured, options)
        with _within(options.memory_bytes):
            _limit_memory(options)
            for argument in arguments:
                repository.serve(argument.servable, argument.read_again)
            service = Service(engine, repository)
            beside = _grpc(service, options, shared=False)
            server = _server(sockets, engine, service, options, managed=False, beside=beside, configured=configured)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: _drain(server, configured))
            engine.watchdog.start(lambda hang: _end_for(hang, engine, server))
            _open(server, configured)
        addresses = (*sockets.addresses(), *([beside.address] if beside else []))
        print(greeting(engine, addresses), flush=True)  # noqa: T201 - this is for the person who started it
        server.run()
    finally:
        configured.finish()
        engine.close()
        sockets.close()
    return 0


def _configure_alone(configured: Configured, options: argparse.Namespace) -> None:
    """Take over pipelines and capture from a settings file; the rest of it is the agent's. Raises `BadSettings`."""
    if options.config is not None:
        settings = _settings(options.config)
        configured.adopt(settings.pipelines, settings.capture, _state_of(settings, options.config))


def _state_of(settings: "AgentSettings", file: Path) -> Path | None:
    """Return the folder for samples and their key; nothing but capture needs one."""
    if not settings.capture.enabled:
        return None
    from protocol.settings import BadSettings

    state = Path(settings.device.state)
    if not state.is_dir():
        raise BadSettings(str(file), 0, f"device.state: {state} is not a folder, and capture needs one")
    return state


if __name__ == "__main__":
    sys.exit(main())
