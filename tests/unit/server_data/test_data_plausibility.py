"""What a device cannot have meant is refused before the database sees it, as a table."""

import msgspec
import pytest

from fleet_server.core.plausibility import (
    Implausible,
    blank_event,
    blank_report,
    check_event,
    check_report,
    check_state,
)
from protocol.messages import Birth, Event, Report, Resources, Window
from protocol.states import EventKind
from protocol.statistics import Histogram, ModelStatistics, TruthStatistics

GOOD = Report(spool="s", sequence=5)


def with_model(**fields: object) -> Report:
    model = ModelStatistics(digest="d", **fields)  # type: ignore[arg-type]  # the table gives the fields
    return msgspec.structs.replace(GOOD, windows=(Window(start=0, span=60_000, models=(model,)),))


BAD_REPORTS = {
    "a sequence of nought": msgspec.structs.replace(GOOD, sequence=0),
    "a negative sequence": msgspec.structs.replace(GOOD, sequence=-1),
    "a sequence beyond 64 bits": msgspec.structs.replace(GOOD, sequence=2**70),
    "covers more than there can be": msgspec.structs.replace(GOOD, covers=6),
    "covers nothing": msgspec.structs.replace(GOOD, covers=0),
    "an empty spool": msgspec.structs.replace(GOOD, spool=""),
    "an endless spool id": msgspec.structs.replace(GOOD, spool="s" * 65),
    "a NUL in the spool id": msgspec.structs.replace(GOOD, spool="a\x00b"),
    "a window before time": msgspec.structs.replace(GOOD, windows=(Window(start=-1, span=1),)),
    "a thousand and one windows": msgspec.structs.replace(GOOD, windows=(Window(start=0, span=1),) * 1001),
    "a negative count": with_model(requests=-1),
    "a count beyond 64 bits": with_model(errors=2**64),
    "a negative count of late": with_model(late=-1),
    "more late and shed than turned away": with_model(dropped=2, late=2, shed=1),
    "too many confidence bins": with_model(confidence=(0,) * 21),
    "a histogram beyond its range": with_model(latency=Histogram(offset=300, counts=(1,) * 100)),
    "a histogram from nowhere": with_model(latency=Histogram(offset=-(10**9), counts=(1,))),
    "a negative bucket": with_model(latency=Histogram(counts=(-5,))),
    "a memory beyond 64 bits": msgspec.structs.replace(
        GOOD, windows=(Window(start=0, span=1, resources=Resources(memory=2**80)),)
    ),
    "a class that cannot be": msgspec.structs.replace(
        GOOD, truth=(TruthStatistics(digest="d", minute=0, confusion=((10_000, 0, 1),)),)
    ),
    "a negative truth": msgspec.structs.replace(
        GOOD, truth=(TruthStatistics(digest="d", minute=0, confusion=((0, 0, -1),)),)
    ),
}


@pytest.mark.parametrize("report", BAD_REPORTS.values(), ids=BAD_REPORTS.keys())
def test_implausible_reports_are_refused(report: Report) -> None:
    with pytest.raises(Implausible):
        check_report(report)


def test_a_missing_sensor_and_a_negative_temperature_are_plausible() -> None:
    check_report(
        msgspec.structs.replace(GOOD, windows=(Window(start=0, span=1, resources=Resources(temperature=-52)),))
    )


def test_a_blank_report_takes_the_same_numbers_and_holds_nothing() -> None:
    bad = msgspec.structs.replace(with_model(requests=-1), covers=3)
    assert blank_report(bad) == Report(spool="s", sequence=5, covers=3)


def test_a_stream_that_makes_no_sense_cannot_be_blanked() -> None:
    with pytest.raises(Implausible):
        blank_report(msgspec.structs.replace(GOOD, sequence=2**70))


def test_an_event_with_endless_detail_is_refused_and_its_number_taken() -> None:
    event = Event(spool="s", sequence=1, at=1, kind=EventKind.AGENT, detail="x" * 501)
    with pytest.raises(Implausible) as refused:
        check_event(event)
    assert blank_event(event, str(refused.value)).detail.startswith("an event could not be stored: detail has 501")


def test_a_birth_with_an_impossible_number_is_refused() -> None:
    with pytest.raises(Implausible):
        check_state(Birth(boot="b", connection=2**64, at=0, agent="1", device_class="x"))
