"""``python -m agent.inference``: the data plane. Wires its parts; alone here are they built.

Without arguments it is control's child: sockets and channel come by descriptor, control says what to serve. With
``serve`` it is a server of its own, unmanaged: for development, benchmarks, and people who want just that.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from agent.channel import CHANNEL_FD, LISTEN_FDS, Channel
from agent.inference.engine import Engine
from agent.inference.http import Limits
from agent.inference.kernel import die_with_parent
from agent.inference.loading import CannotServe, Settings, from_argument
from agent.inference.orders import Orders
from agent.inference.routes import Routes
from agent.inference.server import Server
from agent.inference.statistics import Statistics
from agent.inference.truth import TruthRing
from agent.inference.unmanaged import greeting
from agent.listening import CannotListen, ListeningSockets, inherited_descriptors, parse_tcp
from runtime.interpreter import AUTO

DEFAULT_HTTP = "127.0.0.1:8000"  # the port that Triton's clients try
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; return the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if options.mode == "serve":
        return _serve_unmanaged(options)
    if CHANNEL_FD not in os.environ:
        _parser().error("the agent starts this by itself; to serve models without a fleet, say: serve BUNDLE")
    return _serve_managed(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m agent.inference", description="Serves TFLite models.")
    _add_limits(parser)
    serve = parser.add_subparsers(dest="mode").add_parser("serve", help="serve models without a fleet")
    _add_limits(serve)
    serve.add_argument("models", nargs="+", type=Path, metavar="BUNDLE_OR_TFLITE")
    serve.add_argument("--unix", type=Path, metavar="PATH", help="listen on a Unix socket")
    serve.add_argument("--http", metavar="HOST:PORT", help=f"listen on loopback TCP (default {DEFAULT_HTTP})")
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime", default=AUTO, help="auto, litert or tflite-runtime")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of one interpreter")
    parser.add_argument("--workers", type=_positive, default=1, help="interpreters of each model")
    parser.add_argument("--queue", type=_positive, default=64, help="requests that may wait for a model")
    parser.add_argument("--max-body", type=_positive, default=Limits().body_bytes, help="largest request, in bytes")
    parser.add_argument("--feedback-on-tcp", action="store_true", help="take feedback on TCP too, not only on Unix")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


# ---------------------------------------------------------------- building
def _engine(options: argparse.Namespace) -> Engine:
    return Engine(
        settings=Settings(runtime=options.runtime, threads=options.threads, workers=options.workers),
        statistics=Statistics(),
        truth=TruthRing(),
        now_ms=lambda: time.time_ns() // 1_000_000,
        queue_limit=options.queue,
    )


def _server(sockets: ListeningSockets, engine: Engine, options: argparse.Namespace, *, managed: bool) -> Server:
    routes = Routes(engine, managed=managed, feedback_on_tcp=options.feedback_on_tcp, body_cap=options.max_body)
    return Server(sockets, routes, Limits(body_bytes=options.max_body))


# ---------------------------------------------------------------- control's child
def _serve_managed(options: argparse.Namespace) -> int:
    die_with_parent(os.environ)
    channel = Channel(socket.socket(fileno=int(os.environ[CHANNEL_FD])))
    sockets = ListeningSockets.inherited(inherited_descriptors(os.environ, LISTEN_FDS))
    engine = _engine(options)
    server = _server(sockets, engine, options, managed=True)
    orders = Orders(channel, engine, on_open=server.open, on_drain=server.drain)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in a terminal reaches control, which drains this process
    signal.signal(signal.SIGTERM, lambda *_: server.drain())
    orders.start()
    server.run()
    engine.close()
    orders.finish()
    return 0


# ---------------------------------------------------------------- on its own
def _serve_unmanaged(options: argparse.Namespace) -> int:
    try:
        with TemporaryDirectory(prefix="edgewarden-serve-") as scratch:
            return _serve_models(options, Path(scratch))
    except (CannotServe, CannotListen) as error:
        print(f"edgewarden: {error}", file=sys.stderr)  # noqa: T201 - a command says why it stops
        return EXIT_USAGE


def _serve_models(options: argparse.Namespace, scratch: Path) -> int:
    servables = [from_argument(path, scratch) for path in options.models]
    names = [servable.model for servable in servables]
    if len(set(names)) != len(names):
        raise CannotServe(f"two of the given models have the same name: {', '.join(sorted(names))}")
    http = options.http or (None if options.unix else DEFAULT_HTTP)
    sockets = ListeningSockets.open(unix=options.unix, tcp=parse_tcp(http) if http else None)
    engine = _engine(options)
    try:
        for servable in servables:
            engine.serve(servable)
        server = _server(sockets, engine, options, managed=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.drain())
        print(greeting(engine, sockets.addresses()), flush=True)  # noqa: T201 - this is for the person who started it
        server.open()
        server.run()
    finally:
        engine.close()
        sockets.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
