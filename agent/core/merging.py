"""Makes one report of two, and many of one: what a full spool and the message cap ask for. Pure.

Merging loses resolution, never counts: windows of the same models that follow each other become one longer window,
others stand side by side. Only reports that were never published may be merged ([EW-6.3]);
the spool sees to that.
"""

import msgspec

from protocol.codec import DEFLATE_1, BadMessage, decode_report, encode
from protocol.messages import Report, Resources, Window
from protocol.names import MAX_INFLATED_MESSAGE, MAX_TELEMETRY_MESSAGE
from protocol.statistics import TruthStatistics, merge_by_digest, merge_truth

MAX_MERGED_SPAN = 24 * 3600 * 1000  # ms; a window never says less than which day it was
MAX_WINDOWS = 20  # per report; more would make a lost report cost too much
_MERGED_SIZE = MAX_TELEMETRY_MESSAGE // 4  # bytes; a merged report must stay far from the cap of the wire


class CannotMerge(ValueError):
    """Two reports do not belong together: different spools, not in order, or too much for one."""


def merge_payloads(older: bytes, newer: bytes) -> bytes | None:
    """Merge two encoded reports; None when they cannot be merged or nothing would be won."""
    try:
        merged = encode(merge_reports(decode_report(older), decode_report(newer)), codec=DEFLATE_1)
    except (BadMessage, CannotMerge):
        return None
    return merged if len(merged) < min(len(older) + len(newer), _MERGED_SIZE) else None


def merge_reports(older: Report, newer: Report) -> Report:
    """Return one report in place of two neighbours; it has the newer one's number and covers both."""
    if older.spool != newer.spool or newer.sequence - newer.covers != older.sequence:
        raise CannotMerge(f"reports {older.sequence} and {newer.sequence} are not neighbours")
    windows = merge_windows((*older.windows, *newer.windows))
    if len(windows) > MAX_WINDOWS:
        raise CannotMerge(f"{len(windows)} windows are more than one report may hold")
    return Report(
        spool=newer.spool,
        sequence=newer.sequence,
        covers=older.covers + newer.covers,
        windows=windows,
        truth=merge_truth((*older.truth, *newer.truth)),
        dropped=max(older.dropped, newer.dropped),
    )


def merge_windows(windows: tuple[Window, ...]) -> tuple[Window, ...]:
    """Add up neighbouring windows that belong together; the order stays."""
    merged: list[Window] = []
    for window in windows:
        if merged and _belong_together(merged[-1], window):
            merged[-1] = _add(merged[-1], window)
        else:
            merged.append(window)
    return tuple(merged)


def split(report: Report) -> tuple[Report, Report] | None:
    """Return two reports with the same counts, for when one is too large for the wire; None when it cannot be cut.

    Their sequence numbers are the original's; the caller gives each its own.
    """
    parts = _cut_apart(report) or _cut_windows(report) or _cut_models(report) or _cut_truth(report)
    if parts is None:
        return None
    first, second = parts
    return msgspec.structs.replace(first, covers=1), msgspec.structs.replace(second, covers=1)


def fits(report: Report, encoded: bytes) -> bool:
    """Tell whether a report may travel: both as it is sent and after inflating."""
    return len(encoded) <= MAX_TELEMETRY_MESSAGE and len(encode(report)) <= MAX_INFLATED_MESSAGE


# ---------------------------------------------------------------- windows
def _belong_together(older: Window, newer: Window) -> bool:
    """Same models, no hole between them longer than a window (a hole is a fact), and not more than a day together."""
    hole = newer.start - (older.start + older.span)
    return (
        {model.digest for model in older.models} == {model.digest for model in newer.models}
        and 0 <= hole <= min(older.span, newer.span)
        and newer.start + newer.span - older.start <= MAX_MERGED_SPAN
    )


def _add(older: Window, newer: Window) -> Window:
    return Window(
        start=older.start,
        span=newer.start + newer.span - older.start,
        models=merge_by_digest((*older.models, *newer.models)),
        resources=_merge_resources(older, newer),
    )


def _merge_resources(older: Window, newer: Window) -> Resources | None:
    first, last = older.resources, newer.resources
    if first is None or last is None:
        return last or first
    return Resources(
        cpu=_mean(first.cpu, older.span, last.cpu, newer.span),
        memory=_last(first.memory, last.memory),
        memory_total=_last(first.memory_total, last.memory_total),
        control_rss=_last(first.control_rss, last.control_rss),
        data_plane_rss=_last(first.data_plane_rss, last.data_plane_rss),
        network_in=_sum(first.network_in, last.network_in),
        network_out=_sum(first.network_out, last.network_out),
        disk_free=_last(first.disk_free, last.disk_free),
        temperature=_highest(first.temperature, last.temperature),
    )


def _mean(first: int | None, first_span: int, last: int | None, last_span: int) -> int | None:
    if first is None or last is None:
        return _last(first, last)
    return round((first * first_span + last * last_span) / max(1, first_span + last_span))


def _last(first: int | None, last: int | None) -> int | None:
    return first if last is None else last


def _sum(first: int | None, last: int | None) -> int | None:
    return _last(first, last) if first is None or last is None else first + last


def _highest(first: int | None, last: int | None) -> int | None:
    return _last(first, last) if first is None or last is None else max(first, last)


# ---------------------------------------------------------------- cutting
def _cut_apart(report: Report) -> tuple[Report, Report] | None:
    if not report.windows or not report.truth:
        return None
    return msgspec.structs.replace(report, truth=()), msgspec.structs.replace(report, windows=())


def _cut_windows(report: Report) -> tuple[Report, Report] | None:
    half = len(report.windows) // 2
    if not half:
        return None
    return (
        msgspec.structs.replace(report, windows=report.windows[:half]),
        msgspec.structs.replace(report, windows=report.windows[half:]),
    )


def _cut_models(report: Report) -> tuple[Report, Report] | None:
    if not report.windows or len(report.windows[0].models) < 2:  # noqa: PLR2004 - one cannot be halved
        return None
    window = report.windows[0]
    half = len(window.models) // 2
    first = msgspec.structs.replace(window, models=window.models[:half])
    second = Window(
        start=window.start, span=window.span, models=window.models[half:]
    )  # the readings are in the first
    return msgspec.structs.replace(report, windows=(first,)), msgspec.structs.replace(report, windows=(second,))


def _cut_truth(report: Report) -> tuple[Report, Report] | None:
    if len(report.truth) == 1:
        first, second = _halve_cells(report.truth[0])
    else:
        half = len(report.truth) // 2
        first, second = report.truth[:half], report.truth[half:]
    if not first or not second:
        return None
    return msgspec.structs.replace(report, truth=first), msgspec.structs.replace(report, truth=second)


def _halve_cells(truth: TruthStatistics) -> tuple[tuple[TruthStatistics, ...], tuple[TruthStatistics, ...]]:
    half = len(truth.confusion) // 2
    if not half:
        return (), ()
    return (
        (msgspec.structs.replace(truth, confusion=truth.confusion[:half]),),
        (msgspec.structs.replace(truth, confusion=truth.confusion[half:]),),
    )
