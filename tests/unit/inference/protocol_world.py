"""One data plane in this process, on both transports, with models of every datatype and one that takes pictures."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from inference_parts import engine, servable
from protocol_models import TYPES, flatten_servable

from agent.inference.engine import Engine
from agent.inference.grpc_server.server import GrpcServer
from agent.inference.http import Limits
from agent.inference.repository import Repository
from agent.inference.routes import Routes
from agent.inference.server import Server
from agent.inference.service import Service
from agent.listening import ListeningSockets
from protocol.manifest import Preprocess, TensorSpec

BODY = 8 * 2**20
RGB = TensorSpec(name="picture", dtype="INT8", shape=(1, 6, 4, 3), scale=0.5, zero_point=-3)
RGB_PREPROCESS = Preprocess(mean=(0.0, 127.5, 10.0), scale=(0.25, 0.1, 0.5))
EVERY_TYPE = tuple(TensorSpec(name=name.lower(), dtype=name, shape=(1, 2, 3)) for name in TYPES)

TYPED = tuple(spec for spec in EVERY_TYPE if spec.dtype != "FP16")  # FP16 has no typed contents in gRPC


@dataclass(frozen=True, kw_only=True)
class World:
    """What the tests reach for."""

    engine: Engine
    repository: Repository
    routes: Routes
    http: str
    grpc: str


@contextmanager
def world(root: Path) -> Iterator[World]:
    serving = engine()
    repository = Repository(serving)
    for one in (
        servable(root, "v1", 1),
        flatten_servable(root, *EVERY_TYPE, model="every-type"),
        flatten_servable(root, *TYPED, model="typed"),
        flatten_servable(root, RGB, model="rgb", preprocess=RGB_PREPROCESS),
    ):
        repository.serve(one)
    service = Service(serving, repository)
    sockets = ListeningSockets.open(tcp=("127.0.0.1", 0))
    beside = GrpcServer(service, "127.0.0.1", 0, max_body=BODY, shared=False)
    routes = Routes(serving, managed=False, body_cap=BODY, service=service)
    server = Server(sockets, routes, Limits(body_bytes=BODY), beside=beside)
    thread = threading.Thread(target=server.run)
    thread.start()
    server.open()
    try:
        yield World(
            engine=serving,
            repository=repository,
            routes=routes,
            http=sockets.addresses()[0].removeprefix("http://"),
            grpc=beside.address.removeprefix("grpc://"),
        )
    finally:
        server.drain()
        thread.join()
        sockets.close()
        serving.close()
