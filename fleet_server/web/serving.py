"""Runs ASGI apps on sockets of their own, in one event loop on one thread, until told to stop.

The sockets are bound before anything runs, so that a taken port is an error at start and tests may ask for port 0.
"""

import asyncio
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

WORKERS = 32  # threads for handlers; all of them are synchronous
BACKLOG = 1024
GRACE = 3  # seconds for open requests at the end
_POLL = 0.01  # seconds
KEEP_ALIVE = 15  # seconds
MAX_CONNECTIONS = 2000  # per port


class CannotListen(Exception):
    """An address is taken, or not ours; the operator must choose another."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files of a server certificate with its chain, and its key."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Raise `CannotListen` naming the files when they cannot be used."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise CannotListen(f"the certificate {self.certificate} with key {self.key}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Site:
    """An app and where it answers."""

    app: Any  # ASGI
    listener: socket.socket
    tls: Tls | None = None

    @property
    def port(self) -> int:
        """The port that was bound."""
        return int(self.listener.getsockname()[1])


class WebServer:
    """Serves sites on a thread of its own."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._servers = [_server(site) for site in sites]
        self._thread = threading.Thread(target=self._run, name="web")

    def start(self) -> None:
        """Start; returns when all sites answer."""
        self._thread.start()
        while not all(server.started for server in self._servers) and self._thread.is_alive():
            time.sleep(_POLL)

    def stop(self) -> None:
        """Let open requests end, within `GRACE`, and stop."""
        for server in self._servers:
            server.should_exit = True
        self._thread.join()
        for site in self._sites:
            site.listener.close()

    @property
    def running(self) -> bool:
        """Whether the web thread lives."""
        return self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="web") as executor:
            asyncio.get_running_loop().set_default_executor(executor)
            serving = [
                asyncio.create_task(server.serve(sockets=[site.listener]), name=f"web-{site.port}")
                for server, site in zip(self._servers, self._sites, strict=True)
            ]
            await asyncio.gather(*serving)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raise `CannotListen`."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET  # noqa: PLR2004 - IPv6
    except ValueError:
        family = socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def _server(site: Site) -> uvicorn.Server:
    config = uvicorn.Config(
        site.app,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
        limit_concurrency=MAX_CONNECTIONS,
        ssl_certfile=str(site.tls.certificate) if site.tls else None,
        ssl_keyfile=str(site.tls.key) if site.tls else None,
    )
    return uvicorn.Server(config)
