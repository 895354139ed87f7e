"""Who may do what on the broker, as Mosquitto's dynamic-security plugin writes it: as a file, and as commands.

A device publishes its own ``up/#`` and receives its own ``down/#`` and the server's state; that is all (README.md of
`protocol`, rights). One role a device, because the plugin of Mosquitto 2.0 knows no ``%u``. The plugin, unlike an
``acl_file``, refuses *subscriptions*: a device cannot join the server's shared group and swallow what others report.
"""

import json
from collections.abc import Sequence
from typing import Any

from protocol.topics import ROOT, SERVER_STATE, everything_of

CONTROL_TOPIC = "$CONTROL/dynamic-security/v1"
RESPONSE_TOPIC = "$CONTROL/dynamic-security/v1/response"
_DEVICE_ROLE = "device"
_SERVER_ROLE = "srv"
_NOTHING_BY_DEFAULT = {
    "publishClientSend": False,
    "publishClientReceive": False,
    "subscribe": False,
    "unsubscribe": False,
}


def document(server_user: str, devices: Sequence[str]) -> bytes:
    """Return the plugin's whole configuration file."""
    clients = [{"username": server_user, "roles": [{"rolename": _SERVER_ROLE}]}, *(_client(d) for d in devices)]
    content = {
        "defaultACLAccess": _NOTHING_BY_DEFAULT,
        "clients": clients,
        "groups": [],
        "roles": [_server_role(), _common_role(), *(_own_role(d) for d in devices)],
    }
    return json.dumps(content).encode()


def admission(device: str) -> list[dict[str, Any]]:
    """Return the commands that let one more device in."""
    return [{"command": "createRole", **_own_role(device)}, {"command": "createClient", **_client(device)}]


def expulsion(device: str) -> list[dict[str, Any]]:
    """Return the commands that shut a device out.

    Deleted, never disabled: a disabled client that is known by its certificate comes back with all its rights.
    """
    return [{"command": "deleteClient", "username": device}, {"command": "deleteRole", "rolename": f"d-{device}"}]


def _client(device: str) -> dict[str, Any]:
    return {"username": device, "roles": [{"rolename": _DEVICE_ROLE}, {"rolename": f"d-{device}"}]}


def _own_role(device: str) -> dict[str, Any]:
    up, down = everything_of(device, "up"), everything_of(device, "down")
    acls = [
        _allow("publishClientSend", up),
        _allow("publishClientReceive", down),
        _allow("subscribePattern", down),
    ]
    return {"rolename": f"d-{device}", "acls": acls}


def _common_role() -> dict[str, Any]:
    acls = [
        _allow("publishClientReceive", SERVER_STATE),
        _allow("subscribeLiteral", SERVER_STATE),
        _allow("unsubscribePattern", "#"),
    ]
    return {"rolename": _DEVICE_ROLE, "acls": acls}


def _server_role() -> dict[str, Any]:
    ours, system, control = f"{ROOT}/#", "$SYS/#", "$CONTROL/dynamic-security/#"
    acls = [
        *(_allow("publishClientSend", topic) for topic in (ours, control)),
        *(_allow("publishClientReceive", topic) for topic in (ours, system, control)),
        *(_allow("subscribePattern", topic) for topic in (ours, system, control, "$share/#")),
        _allow("unsubscribePattern", "#"),
    ]
    return {"rolename": _SERVER_ROLE, "acls": acls}


def _allow(kind: str, topic: str) -> dict[str, Any]:
    return {"acltype": kind, "topic": topic, "priority": 0, "allow": True}
