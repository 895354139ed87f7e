"""README.md is the contract in prose: it must name every field on the wire, and none that does not exist."""

import re
from enum import Enum
from pathlib import Path

import msgspec
import pytest

import protocol
from protocol import commands, device_api, manifest, messages, names, release, statistics
from protocol.states import CommandOutcome, DeploymentState, EventKind, RejectReason, RuntimeName, Task
from protocol.topics import ROOT, SERVER_STATE, Channel

README = (Path(protocol.__file__).parent / "README.md").read_text()
CODE_ONLY = {"EnrolmentToken", "Strict"}  # travels as text ([EW-7.2]); base class without fields
STRUCTS = sorted(
    {
        value
        for module in (messages, commands, statistics, device_api, release, manifest)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__name__ not in CODE_ONLY
    }
    - {msgspec.Struct},
    key=lambda struct: struct.__name__,
)


def section(title: str) -> str:
    """Return the text under a third-level heading."""
    found = re.search(rf"^### {title}\n(.*?)(?=^##)", README + "\n## end", re.MULTILINE | re.DOTALL)
    assert found is not None, f"README.md has no section {title}"
    return found[1]


def wire_fields(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Return {name on the wire: name in the code}; a tag has no name in the code."""
    fields = {field.encode_name: field.name for field in msgspec.structs.fields(struct)}
    config = struct.__struct_config__
    return fields | ({config.tag_field: ""} if config.tag_field else {})


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_field_on_the_wire_is_listed_and_no_other(struct: type[msgspec.Struct]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w*) ?\| (.+?) \|", section(struct.__name__), re.MULTILINE)
    assert wire_fields(struct) == {wire: name for wire, name, _ in rows}


@pytest.mark.parametrize("words", [DeploymentState, RejectReason, EventKind, CommandOutcome, RuntimeName, Task])
def test_every_fixed_word_is_listed(words: type[Enum]) -> None:
    listed = set(re.findall(r"^\| `([\w-]+)` \|", README.split("## 10.")[-1], re.MULTILINE))
    assert {word.value for word in words} <= listed


@pytest.mark.parametrize("channel", list(Channel))
def test_every_topic_is_listed(channel: Channel) -> None:
    assert f"| `{ROOT}/d/<device>/{channel.value}` |" in README
    assert f"| `{SERVER_STATE}` |" in README


@pytest.mark.parametrize("shape", ["DEVICE_ID", "MODEL_NAME", "VARIANT_NAME", "MEMBER_NAME"])
def test_every_shape_of_a_name_is_as_in_the_code(shape: str) -> None:
    assert f"`{getattr(names, shape).pattern}`" in README


PATHS = ["CA_PATH", "ENROL_PATH", "DIRECTOR_METADATA_PATH", "IMAGE_METADATA_PATH", "BUNDLES_PATH"]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_of_the_device_api_is_listed(path: str) -> None:
    assert getattr(device_api, path) in README


def test_requirements_are_numbered_once_and_in_order() -> None:
    found = [tuple(map(int, pair)) for pair in re.findall(r"\*\*\[EW-(\d+)\.(\d+)\]\*\*", README)]
    assert sorted(set(found)) == found


def test_requirements_named_in_the_code_exist() -> None:
    root = Path(protocol.__file__).parent.parent
    numbered = set(re.findall(r"\*\*\[(EW-\d+\.\d+)\]\*\*", README))
    for folder in ("protocol", "agent", "fleet_server", "simulator", "converters", "runtime"):
        for file in (root / folder).rglob("*.py"):
            assert set(re.findall(r"\[(EW-[\d.]+)\]", file.read_text())) <= numbered, file


def test_links_inside_the_page_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= anchors
