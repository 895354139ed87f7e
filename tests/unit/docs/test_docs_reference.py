"""The reference says what the programs say: settings as their structs, the other pages made anew and compared."""

import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from agent.config import AgentSettings
from agent.core.delegates import Delegate
from agent.core.pipelines import PipelineSettings, Preprocess, Sink, Source
from fleet_server.config import BadConfig, ServerConfig, Settings, settle

REFERENCE = Path(__file__).parents[3] / "docs" / "reference"
ROW = re.compile(r"^\| `(\w+)` \| (.*) \|$", re.MULTILINE)
AGENT, SERVER = (REFERENCE / "settings.md").read_text().split("## server.toml")
FIELDS = {field.encode_name: field.type for field in msgspec.structs.fields(AgentSettings)}
TABLES = {name: type_ for name, type_ in FIELDS.items() if isinstance(type_, type)}
PARTS = {
    f"{place} of kind {part.__struct_config__.tag}": part
    for place, kinds in (("pipeline.source", Source), ("pipeline.preprocess", Preprocess), ("pipeline.sink", Sink))
    for part in kinds.__args__
}
NOT_SAID = {"data": "required", "database": "SQLite in `data`", "console_certificate": "none", "console_key": "none"}


def rows(text: str) -> dict[str, list[str]]:
    """Return key -> the other cells of its row."""
    return {key: [cell.strip() for cell in cells.split("|")] for key, cells in ROW.findall(text)}


def table(name: str) -> dict[str, list[str]]:
    """Return the rows of a table of agent.toml."""
    _, _, after = AGENT.partition(f"### [{name}]\n")
    return rows(after.partition("\n### ")[0])


def bounds_of(annotation: object) -> str:
    """Return how the page writes the bounds of a field."""
    info = msgspec.inspect.type_info(annotation)
    if isinstance(info, msgspec.inspect.IntType | msgspec.inspect.FloatType):
        return f"{info.ge:g}…{info.le:g}" if isinstance(info, msgspec.inspect.FloatType) else f"{info.ge}…{info.le}"
    if isinstance(info, msgspec.inspect.LiteralType):
        return ", ".join(f"`{value}`" for value in sorted(info.values))
    return ""


# ---------------------------------------------------------------- agent.toml
def test_the_tables_of_agent_toml_are_those_of_the_struct() -> None:
    assert list(TABLES) == re.findall(r"^### \[(\w+)\]$", AGENT, re.MULTILINE)


@pytest.mark.parametrize("name", TABLES)
def test_keys_and_defaults_of_a_table_are_those_of_the_struct(name: str) -> None:
    known = {field.encode_name: f"`{json.dumps(field.default)}`" for field in msgspec.structs.fields(TABLES[name])}
    assert known == {key: cells[0] for key, cells in table(name).items()}


@pytest.mark.parametrize("name", TABLES)
def test_bounds_of_a_table_are_those_of_the_struct(name: str) -> None:
    known = {field.encode_name: bounds_of(field.type) for field in msgspec.structs.fields(TABLES[name])}
    shown = {key: cells[1] for key, cells in table(name).items()}
    assert known | {"http": "loopback"} == shown | {"http": "loopback"}


@pytest.mark.parametrize("name", TABLES)
def test_every_key_of_a_table_has_a_meaning(name: str) -> None:
    assert [] == [key for key, cells in table(name).items() if not cells[2]]


# ---------------------------------------------------------------- pipelines
def default_of(field: msgspec.structs.FieldInfo) -> str:
    """Return how the page writes a default."""
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{json.dumps(field.default_factory())}`"
    if field.default is msgspec.NODEFAULT:
        return "required"
    return "`raw`" if isinstance(field.default, msgspec.Struct) else f"`{json.dumps(field.default)}`"


def test_keys_defaults_and_bounds_of_a_delegate_are_those_of_the_struct() -> None:
    known = {
        field.encode_name: [default_of(field), bounds_of(field.type)] for field in msgspec.structs.fields(Delegate)
    }
    _, _, after = AGENT.partition("### Delegates\n")
    assert known == {key: cells[:2] for key, cells in rows(after.partition("\n#")[0]).items()}


def test_every_part_of_a_pipeline_has_its_table() -> None:
    assert list(PARTS) == re.findall(r"^#### (.*)$", AGENT, re.MULTILINE)


@pytest.mark.parametrize("heading", ["### Pipelines", *(f"#### {name}" for name in PARTS)])
def test_keys_defaults_and_bounds_of_a_pipeline_are_those_of_the_structs(heading: str) -> None:
    struct = PARTS.get(heading.removeprefix("#### "), PipelineSettings)
    known = {
        field.encode_name: [default_of(field), bounds_of(field.type)] for field in msgspec.structs.fields(struct)
    }
    text = AGENT.partition(f"{heading}\n")[2].partition("\n###")[0]
    assert known == {key: cells[:2] for key, cells in rows(text).items()}
    assert [] == [key for key, cells in rows(text).items() if not cells[2]]


# ---------------------------------------------------------------- server.toml
def test_keys_of_server_toml_are_those_of_the_struct() -> None:
    assert list(Settings.__struct_fields__) == list(rows(SERVER))


def test_defaults_of_server_toml_are_those_that_are_filled_in() -> None:
    filled = settle(Settings(data="data"), Settings())
    known = {"host": filled.devices.host} | {
        field.name: getattr(filled, field.name) for field in fields(ServerConfig)
    }
    expected = {key: NOT_SAID.get(key) or f"`{_written(known[key])}`" for key in Settings.__struct_fields__}
    assert expected == {key: cells[0] for key, cells in rows(SERVER).items()}


def _written(value: object) -> str:
    return json.dumps(value) if isinstance(value, tuple) else str(value)


def test_bounds_of_server_toml_are_those_that_are_checked() -> None:
    bounded = {key: cells[1] for key, cells in rows(SERVER).items() if cells[1]}
    kept = ["retention_days", "quarter_retention_days", "daily_retention_days"]
    assert ["broker_admin_port", *kept] == list(bounded)
    for key, bounds in bounded.items():
        low, high = (int(bound) for bound in bounds.split("…"))
        for right in (low, high):
            settle(Settings(**{"data": "data", key: right}), Settings())
        for wrong in (low - 1, high + 1):
            with pytest.raises(BadConfig):
                settle(Settings(**{"data": "data", key: wrong}), Settings())


def test_flags_of_the_settings_page_are_in_the_command_line_page() -> None:
    flags = {cells[2].strip("`") for cells in rows(SERVER).values() if cells[2]}
    (serve,) = re.findall(
        r"^### edgewarden-server serve$(.*?)^##", (REFERENCE / "cli.md").read_text(), re.MULTILINE | re.DOTALL
    )
    known = {word.split()[0] for word in re.findall(r"^\| `(--[^`]*)`", serve, re.MULTILINE)}
    assert known - {"--config", "--log-level"} == flags


# ---------------------------------------------------------------- pages that are made from the programs
@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_reference_generate", REFERENCE / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["access.md", "cli.md", "states.md"])
def test_a_page_is_what_the_programs_say_today(generate: ModuleType, name: str) -> None:
    made = generate.pages()[name]
    assert made == (REFERENCE / name).read_text(), "run: python docs/reference/generate.py"


def test_the_pages_do_not_depend_on_the_terminal(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = generate.pages()
    monkeypatch.setenv("COLUMNS", "40")
    assert wide == generate.pages()
