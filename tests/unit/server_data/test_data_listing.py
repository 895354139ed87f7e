"""Lists fit a terminal of 80 columns whatever devices and models are called; ``--wide`` shows all of it."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from fleet_server.api_types import DeviceView, ModelOnDevice, ModelVersion
from fleet_server.cli import listing, orders, output
from protocol.manifest import Task
from protocol.metrics import proportion
from protocol.states import DeploymentState, PresenceState, RejectReason

LONG = "camera-at-the-north-gate-of-the-second-warehouse-in-bergen-0001"
DIGEST = "0123456789abcdef" * 4
SHARE = proportion(908_000, 1_000_000)


def on_device(model: str, wanted: int, running: int | None = None) -> ModelOnDevice:
    return ModelOnDevice(
        model=model,
        wanted_version=wanted,
        running_version=running,
        running_digest=DIGEST,
        state=DeploymentState.ROLLED_BACK,
        reason=RejectReason.CRASHED_IN_PROBATION,
        p95_us=12_345_678.0,
        accuracy=SHARE,
    )


def device(name: str, *models: ModelOnDevice) -> DeviceView:
    return DeviceView(
        id=name,
        labels={},
        presence=PresenceState.OFFLINE,
        last_seen=0,
        agent="0.1.0",
        device_class="aarch64",
        director_version_wanted=1,
        director_version_accepted=1,
        models=models,
        resources=None,
        reports=0,
        missing=0,
    )


DEVICES = (
    device("edge-1", on_device("digits", 12, 11), on_device("a-model-with-a-name-of-63-letters" + "x" * 30, 1)),
    device(LONG),
)
VERSIONS = tuple(
    ModelVersion(
        model=name,
        version=1234,
        variant="float16",
        family=name,
        title="a title that takes up half of the line, or so it seems",
        task=Task.CLASSIFICATION,
        sha256=DIGEST,
        length=8_062_000,
        published_at=0,
        running_on=1000,
        accuracy=SHARE,
    )
    for name in ("digits", LONG)
)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Write to a page of 80 columns instead of the terminal."""
    page = io.StringIO()
    monkeypatch.setattr(output, "out", Console(width=80, file=page))
    return page.getvalue


def test_devices_fit_80_columns_and_say_what_is_wanted_beside_what_runs(printed: Callable[[], str]) -> None:
    listing.print_devices(DEVICES, wide=False)
    text = printed()
    assert 80 >= max(map(len, text.splitlines()))
    assert [] == [
        word for word in ("v11 → v12", "– → v1", "offline", "rolled", "90.8 %", "n=1000000)") if word not in text
    ]
    assert LONG in "".join(line[:40].split("  ")[0].strip() for line in text.splitlines())


def test_versions_fit_80_columns_with_a_digest_that_is_short(printed: Callable[[], str]) -> None:
    listing.print_versions(VERSIONS, wide=False)
    text = printed()
    assert 80 >= max(map(len, text.splitlines()))
    assert [] == [word for word in ("1234", "float16", "1000", "90.8 %", DIGEST[:8]) if word not in text]
    assert DIGEST[:9] not in text


def test_what_one_device_runs_fits_80_columns(printed: Callable[[], str]) -> None:
    listing.print_models_of(DEVICES[0])
    assert 80 >= max(map(len, printed().splitlines()))


def test_a_wide_list_has_everything_on_one_line(
    printed: Callable[[], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listing.print_versions(VERSIONS, wide=True)
    listing.print_devices(DEVICES, wide=True)
    lines = capsys.readouterr().out.splitlines()
    assert 1 + len(VERSIONS) + 1 + 3 == len(lines)
    assert [] == [word for word in (LONG, DIGEST, VERSIONS[0].title, "8062000") if word not in lines[2]]
    assert [] == [
        word for word in ("v12", "v11", "90.8 % (90.7 to 90.9, n=1000000)", "12345.68") if word not in lines[4]
    ]
    assert "" == printed()


def test_what_is_watched_ends_with_a_whole_line_where_nobody_watches(printed: Callable[[], str]) -> None:
    one = orders.Progress(
        device="edge-1", target=1, state=DeploymentState.COMMITTED, running=1, reason="", online="online"
    )
    with orders._live(shown=True) as live:
        for _ in range(2):
            live.update(orders._table([one]), refresh=True)
    header, row, after = printed().split("\n")
    assert ("edge-1", "committed", "") == (row.split()[0], row.split()[4], after)
    assert header.startswith("device")
