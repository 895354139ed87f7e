"""The whole server on a real PostgreSQL: it starts, lets people in, is backed up while it runs, and ends in order."""

import urllib.request
from pathlib import Path

import pytest
from postgres_cluster import Cluster

from fleet_server.app import FleetServer
from fleet_server.config import Settings, settle
from fleet_server.safekeeping import backup

pytestmark = pytest.mark.broker


def test_a_server_runs_on_postgresql_and_is_backed_up_meanwhile(tmp_path: Path, postgres: Cluster) -> None:
    url = postgres.database()
    settings = Settings(
        data=str(tmp_path / "data"),
        console="127.0.0.1:0",
        devices="127.0.0.1:0",
        broker="127.0.0.1:0",
        broker_admin_port=0,
        public_hosts=("localhost",),
        database=url.render_as_string(hide_password=False),
    )
    config = settle(settings, Settings())
    server = FleetServer(config)
    server.start()
    try:
        assert server.new_password
        with urllib.request.urlopen(f"{server.console_url}/login", timeout=20) as answer:
            assert answer.status == 200
        manifest = backup(config, tmp_path / "backup.zip")
    finally:
        server.stop()
    names = {member.name for member in manifest.members}
    assert {"database.db", "data/admin-password", "data/authority/device-ca.key"} <= names
    assert not any(name.startswith(("data/broker", "data/deltas", "data/lock")) for name in names)
    postgres.drop(url)
