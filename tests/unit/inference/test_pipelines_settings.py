"""``[[pipeline]]`` and ``[capture]`` in agent.toml: what is taken, what is refused and how it is said."""

from pathlib import Path

import msgspec
import pytest

from agent.channel import Configure
from agent.config import AgentSettings, load_settings
from agent.core.pipelines import DirectorySource, FileSink, ImagePreprocess, RawPreprocess, WebhookSink
from protocol.release import DeviceConfig
from protocol.settings import BadSettings

GOOD = """
[capture]
enabled = true
margin_below = 0.2

[[pipeline]]
name = "door"
model = "digits"
[pipeline.source]
kind = "directory"
path = "/srv/in"
[pipeline.preprocess]
kind = "image"
std = 16.0
[[pipeline.sink]]
kind = "file"
path = "/srv/out.jsonl"
[[pipeline.sink]]
kind = "webhook"
url = "http://127.0.0.1:9/hook"

[[pipeline]]
name = "gate"
model = "digits"
[pipeline.source]
kind = "http"
"""


def read(folder: Path, text: str) -> AgentSettings:
    file = folder / "agent.toml"
    file.write_text(text)
    return load_settings(file)


def test_pipelines_are_read_and_what_is_not_said_has_its_default(tmp_path: Path) -> None:
    settings = read(tmp_path, GOOD)
    door, gate = settings.pipelines
    assert DirectorySource(path="/srv/in") == door.source
    assert ImagePreprocess(std=16.0) == door.preprocess
    assert (FileSink(path="/srv/out.jsonl"), WebhookSink(url="http://127.0.0.1:9/hook")) == door.sinks
    assert ("latest", RawPreprocess(), ()) == (gate.policy, gate.preprocess, gate.sinks)
    assert settings.capture.enabled


def test_what_is_read_travels_to_the_data_plane_unchanged(tmp_path: Path) -> None:
    settings = read(tmp_path, GOOD)
    order = Configure(pipelines=settings.pipelines, capture=settings.capture, state="/s")
    assert order == msgspec.json.decode(msgspec.json.encode(order), type=Configure)


def test_nothing_that_the_fleet_signs_has_room_for_a_pipeline_or_a_hook() -> None:
    names = set(DeviceConfig.__struct_fields__)
    assert not names & {"pipeline", "pipelines", "exec", "command", "redact", "redact_command"}


BROKER = 'kind = "mqtt"\ntopic = "t"\n'
BAD = {
    "unknown kind of source": ('kind = "directory"', 'kind = "telepathy"', "pipeline.*source.*telepathy"),
    "unknown kind of sink": ('kind = "webhook"', 'kind = "pigeon"', "pigeon"),
    "unknown kind of preprocessing": ('kind = "image"', 'kind = "magic"', "magic"),
    "a directory without its path": ('path = "/srv/in"', "", "path"),
    "an empty path": ('path = "/srv/in"', 'path = ""', "path"),
    "an unknown key of a source": ('path = "/srv/in"', 'path = "/x"\ntopic = "t"', "topic"),
    "an unknown key of a sink": ('path = "/srv/out.jsonl"', 'path = "/x"\ncolour = 1', "colour"),
    "an unknown key of capture": ("margin_below = 0.2", "margin_over = 0.2", "margin_over"),
    "a share above 1": ("margin_below = 0.2", "margin_below = 20", "margin_below"),
    "a name with spaces": ('name = "door"', 'name = "the door"', "name"),
    "the same name twice": ('name = "gate"', 'name = "door"', "two pipelines are named 'door'"),
    "an address that is none": ('url = "http://127.0.0.1:9/hook"', 'url = "ftp://x/y"', "url"),
    "two hooks": (
        "margin_below = 0.2",
        'redact = "a:b"\nredact_command = ["c"]',
        "both set",
    ),
    "an unknown policy": ('name = "door"', 'name = "door"\npolicy = "some"', "policy"),
    "an interval without a time": ('kind = "http"', 'kind = "interval"\npath = "/x"', "either seconds or cron"),
    "an interval without an object": (
        'kind = "http"',
        'kind = "interval"\nseconds = 5',
        "either a path or a command",
    ),
    "files for TLS, but no TLS": (
        'kind = "http"',
        f"{BROKER}ca_file = 'ca'",
        "named for 127.0.0.1, but tls is not true",
    ),
    "a certificate without its key": ('kind = "http"', f"{BROKER}tls = true\ncertificate_file = 'c'", "go together"),
    "a password without a name": ('kind = "http"', f"{BROKER}password_file = 'p'", "needs a username"),
    "an empty command": ('kind = "http"', 'kind = "exec"\ncommand = []', "command"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_refused_and_named(tmp_path: Path, case: str) -> None:
    old, new, said = BAD[case]
    assert GOOD.count(old) == 1
    with pytest.raises(BadSettings, match=said):
        read(tmp_path, GOOD.replace(old, new))


def test_two_sinks_do_not_share_a_file(tmp_path: Path) -> None:
    sink = '[[pipeline.sink]]\nkind = "file"\npath = "/srv/out.jsonl"\n'
    with pytest.raises(BadSettings, match=r"two sinks write to /srv/out\.jsonl"):
        read(tmp_path, GOOD + sink)
