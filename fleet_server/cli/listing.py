"""How devices and published versions stand in lists: in the 80 columns of a terminal, or with ``--wide`` all of it.

What is only now and then of interest (titles, sizes, whole digests, latency) is left to the wide list. Names fold
where they are long; a state or a figure never does.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from fleet_server.api_types import DeviceView, ModelOnDevice, ModelVersion
from fleet_server.cli import output
from fleet_server.core.care import say_terms
from protocol.states import PresenceState

SHORT_DIGEST = 8  # hex digits; enough to tell versions apart by eye
Wide = Annotated[bool, typer.Option("--wide", help="Show every column in full, however long the lines are.")]
Cell = str | Text | None


def print_devices(views: Sequence[DeviceView], *, wide: bool) -> None:
    """List devices with what they run."""
    table = _table("device", "presence", "model", "version", "update", "accuracy 5 min")
    if wide:
        table = output.table("device", "presence", "model", "wanted", "running", "update", "accuracy 5 min", "p95 ms")
    for view in views:
        for cells in _wide_rows(view) if wide else _rows(view):
            output.row(table, cells)
    output.print_table(table, wide=wide)


def print_models_of(view: DeviceView) -> None:
    """List what one device runs."""
    table = _table("model", "wanted", "running", "update", "accuracy 5 min", "p95 ms")
    for model in view.models:
        output.row(table, _on_device(model))
    output.print_table(table)


def print_sentences_of(view: DeviceView) -> None:
    """Write what was ordered of each model and what the device said of it, where there is anything to say."""
    for one in view.models:
        said = {"order": say_terms(one.shadow, forced=one.forced), "shadow": one.shadow_verdict, "newest": one.detail}
        if one.detail == one.shadow_verdict:
            del said["newest"]
        for what, sentence in said.items():
            if sentence:
                line = output.clean(f"{one.model}, {what}: {sentence}")
                output.out.print(line, markup=False, highlight=False, soft_wrap=True)


def print_versions(versions: Sequence[ModelVersion], *, wide: bool) -> None:
    """List published versions."""
    table = _table("model", "version", "variant", "on", "accuracy", "sha256")
    if wide:
        table = output.table("model", "version", "variant", "title", "on", "accuracy", "bytes", "sha256")
    for one in versions:
        title, size = ([one.title], [str(one.length)]) if wide else ([], [])
        digest = one.sha256 if wide else one.sha256[:SHORT_DIGEST]
        first = [one.model, str(one.version), one.variant, *title, str(one.running_on)]
        output.row(table, [*first, output.accuracy(one.accuracy), *size, digest])
    output.print_table(table, wide=wide)
    for hindrance in sorted({one.hindrance for one in versions if one.hindrance}):
        output.out.print(output.clean(hindrance), markup=False, highlight=False, soft_wrap=True)


# ---------------------------------------------------------------- rows
def _rows(view: DeviceView) -> Iterator[list[Cell]]:
    first: list[Cell] = [view.id, _presence(view.presence)]
    for one in view.models:
        yield [*first, one.model, _version(one), _update(one), output.accuracy(one.accuracy)]
    if not view.models:
        yield first


def _wide_rows(view: DeviceView) -> Iterator[list[Cell]]:
    first: list[Cell] = [view.id, _presence(view.presence)]
    yield from ([*first, *_on_device(one)] for one in view.models)
    if not view.models:
        yield first


def _on_device(one: ModelOnDevice) -> list[Cell]:
    wanted, running = _number(one.wanted_version), _number(one.running_version)
    figures = [output.accuracy(one.accuracy), output.milliseconds(one.p95_us)]
    return [one.model, wanted, running, _update(one), *figures]


def _version(one: ModelOnDevice) -> str:
    """Return what runs, and what is wanted where that is something else."""
    running = _number(one.running_version) or "–"
    return (
        running if one.wanted_version == one.running_version else f"{running} → {_number(one.wanted_version) or '–'}"
    )


def _number(version: int | None) -> str | None:
    return None if version is None else f"v{version}"


def _presence(value: PresenceState) -> Text:
    return output.state(value)


def _update(one: ModelOnDevice) -> Text:
    text = output.state(one.state)
    if one.reason:
        text.append(f" {one.reason.value}")
    return text


# ---------------------------------------------------------------- columns
_FOLDS = ("device", "model")  # named by people, at any length
_WRAPS = ("update", "accuracy", "accuracy 5 min")  # between words


def _table(*names: str) -> Table:
    """Return a table that is shrunk where it hurts least."""
    table = output.table()
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name not in (*_FOLDS, *_WRAPS))
    return table
