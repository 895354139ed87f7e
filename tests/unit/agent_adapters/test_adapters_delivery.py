"""How a bundle comes: by a delta, from mirrors, at its pace, within the day's budget, over kills and restarts."""

import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import bsdiff4
import msgspec
import pytest
import zstandard
from device_pki import Authority
from https_server import Book, Request, https_server

from agent.adapters.allowance import AHEAD, Allowance
from agent.adapters.delta import RebuildChild, installed_methods
from agent.adapters.download import BundleDownloads
from agent.adapters.https import HttpsServer, Mirror
from agent.adapters.identity import context_for
from agent.config import load_settings
from agent.core.downloading import DAY_MS, RESERVE
from agent.ports import Postponed, Rebuilding, Refusal, Target, Trouble, Weather
from protocol.bundle import digest_of, read_manifest, unpack, write_bundle
from protocol.manifest import Golden, Manifest, Needs, TensorSpec
from protocol.release import BSDIFF, DELTA_METHODS, NO_BASE, ZSTD, ZSTD_PATCH, Assignment, Delta, release_of
from protocol.settings import BadSettings
from protocol.states import RejectReason, Task

DICE = random.Random(7)
WEIGHTS = DICE.randbytes(100_000) + bytes(50_000)
TENSOR = TensorSpec(name="x", dtype="INT8", shape=(1, 4))


def bundle(version: int, weights: bytes) -> bytes:
    members = {"model.tflite": weights, "golden.npz": b"samples"}
    manifest = Manifest(
        model="digits",
        version=version,
        variant="int8",
        task=Task.OTHER,
        inputs=(TENSOR,),
        outputs=(TENSOR,),
        needs=Needs(memory=1),
        golden=Golden(member="golden.npz", samples=1, tolerance=0.0),
        members={name: digest_of(data) for name, data in members.items()},
    )
    target = BytesIO()
    write_bundle(target, manifest, members)
    return target.getvalue()


OLD = bundle(1, WEIGHTS)
NEW = bundle(2, WEIGHTS[:80_000] + bytes(50) + WEIGHTS[80_050:])
OLD_SHA, NEW_SHA = digest_of(OLD), digest_of(NEW)
NOON = 20_000 * DAY_MS + DAY_MS // 2


def target(**deltas: tuple[str, bytes]) -> Target:
    """The new bundle; ``old`` and ``none`` name the bases of deltas (method, bytes)."""
    named = {"old": OLD_SHA, "none": NO_BASE}
    offers = {
        named[base]: Delta(method=method, length=len(data), sha256=digest_of(data))
        for base, (method, data) in deltas.items()
    }
    release = release_of(read_manifest(BytesIO(NEW)))
    return Target(release=release, assignment=Assignment(rollout="r", deltas=offers), sha256=NEW_SHA, length=len(NEW))


def zstd_patch(base: bytes, made: bytes) -> bytes:
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=20, enable_ldm=True)
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(made)


GOOD = {
    BSDIFF: ("old", bsdiff4.diff(OLD, NEW)),
    ZSTD_PATCH: ("old", zstd_patch(OLD, NEW)),
    ZSTD: ("none", zstandard.ZstdCompressor().compress(NEW)),
}


GOOD_OLD = (BSDIFF, GOOD[BSDIFF][1])


# ---------------------------------------------------------------- a server, mirrors, a device
@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def running(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    with https_server(authority.server_tls(tmp_path_factory.mktemp("tls"))) as book:
        yield book


@pytest.fixture(scope="module")
def two_mirrors() -> Iterator[tuple[Book, Book]]:
    with https_server(None) as first, https_server(None) as second:
        yield first, second


@dataclass
class Clock:
    now: int = NOON
    seconds: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> int:
        return self.now

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds


@dataclass
class Device:
    """What a test may look at."""

    folder: Path
    https: HttpsServer
    clock: Clock
    told: list[str] = field(default_factory=list)

    def downloads(self, **parts: object) -> BundleDownloads:
        given = {"base": self.base, "rebuilds": RebuildChild(), "clock": self.clock, **parts}
        return BundleDownloads(self.https, self.folder, tell=lambda _, detail: self.told.append(detail), **given)  # type: ignore[arg-type]  # parts of several types

    def allowance(self, **limits: int) -> Allowance:
        return Allowance(
            self.folder.parent / "ledger.json",
            clock=self.clock,
            monotonic=self.clock.monotonic,
            sleep=self.clock.sleep,
            **limits,
        )

    def base(self, digest: str) -> str | None:
        folder = self.folder.parent / "models" / digest
        return str(folder) if folder.exists() else None

    def left(self) -> list[str]:
        return sorted(path.name.removeprefix(NEW_SHA) for path in self.folder.iterdir())


@pytest.fixture
def device(running: Book, authority: Authority, tmp_path: Path) -> Iterator[Device]:
    running.seen.clear()
    running.answer = serve({})
    context = context_for(authority.pem)
    https = HttpsServer(running.url, tls=lambda: context, authorise=lambda: "a.jwt.token", read_timeout=10)
    store = tmp_path / "models" / OLD_SHA
    store.mkdir(parents=True)
    (tmp_path / "old.ewb").write_bytes(OLD)
    with (tmp_path / "old.ewb").open("rb") as source:
        unpack(source, lambda name: (store / name).open("xb"))
    yield Device(folder=tmp_path / "downloads", https=https, clock=Clock())
    https.close()


def serve(deltas: dict[str, bytes], whole: bytes = NEW) -> Callable[[Request], None]:
    """Answer with deltas by method, or with the bundle; in ranges."""

    def answer(request: Request) -> None:
        _, _, query = request.path.partition("?")
        if query:
            body = deltas.get(query.rpartition("=")[2])
            if body is None:
                request.reply(404)
                return
        else:
            body = whole
        said = request.headers.get("Range")
        start = int(said.removeprefix("bytes=").removesuffix("-")) if said else 0
        if start:
            request.reply(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.reply(200, body)

    return answer


def fetch(downloads: BundleDownloads, wanted: Target | None = None) -> bytes:
    return Path(downloads.fetch(wanted or target(), lambda _: None, lambda: False)).read_bytes()


def paths(book: Book) -> list[str]:
    return [path.rpartition("/")[2].replace(NEW_SHA, "NEW").replace(OLD_SHA, "OLD") for path, _ in book.seen]


# ---------------------------------------------------------------- deltas
@pytest.mark.parametrize("method", DELTA_METHODS)
def test_a_bundle_is_made_from_a_delta(device: Device, running: Book, method: str) -> None:
    base, data = GOOD[method]
    running.answer = serve({method: data})

    assert NEW == fetch(device.downloads(), target(**{base: (method, data)}))
    assert [f"NEW?from={'OLD' if base == 'old' else base}&method={method}"] == paths(running)
    assert [".ewb"] == device.left()
    assert [f"it came as a {method} delta: {len(data)} of {len(NEW)} bytes"] == device.told
    assert len(data) < len(NEW)


def bomb() -> bytes:
    """A frame of a few bytes that makes a gigabyte, and says so nowhere."""
    encoder = zstandard.ZstdCompressor(level=1).compressobj()
    zeros = bytes(1 << 20)
    return b"".join(encoder.compress(zeros) for _ in range(256)) + encoder.flush()


def bsdiff_bomb() -> bytes:
    """A patch whose diff block inflates to far more than the memory allows."""
    import bz2
    import struct

    control, diff = bz2.compress(struct.pack("<qqq", len(NEW), 0, 0)), bz2.compress(bytes(1 << 28))
    return b"BSDIFF40" + struct.pack("<qqq", len(control), len(diff), len(NEW)) + control + diff + bz2.compress(b"")


def flipped(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 0xFF]) + data[-39:]


SMALL = zstandard.ZstdCompressor().compress(NEW[:1000])
BAD: list[tuple[str, str, bytes, str]] = [
    ("zstd of something else", ZSTD, SMALL, "less than were signed"),
    ("zstd that is noise", ZSTD, DICE.randbytes(500), "damaged"),
    ("a zstd bomb", ZSTD, bomb(), "more than the"),
    ("a patch of another base", ZSTD_PATCH, zstd_patch(bundle(1, WEIGHTS[1000:] + WEIGHTS[:1000]), NEW), ""),
    ("a damaged patch", ZSTD_PATCH, flipped(GOOD[ZSTD_PATCH][1]), ""),
    ("bsdiff of another base", BSDIFF, bsdiff4.diff(bundle(1, WEIGHTS[1000:] + WEIGHTS[:1000]), NEW), ""),
    ("bsdiff that is damaged", BSDIFF, flipped(GOOD[BSDIFF][1]), ""),
    ("bsdiff that is noise", BSDIFF, DICE.randbytes(500), "announces"),
    ("bsdiff cut in its header", BSDIFF, GOOD[BSDIFF][1][:20], "header"),
    ("bsdiff that makes something else", BSDIFF, bsdiff4.diff(OLD, NEW[:-1]), "announces"),
    ("a bsdiff bomb", BSDIFF, bsdiff_bomb(), "memory"),
]


@pytest.mark.parametrize(("method", "data", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_delta_is_tried_once_and_then_the_bundle_comes_whole(
    device: Device, running: Book, method: str, data: bytes, says: str
) -> None:
    """Signed by a stolen server, say: the delta is the signed one, and yet makes something else."""
    running.answer = serve({method: data})
    downloads = device.downloads()
    wanted = target(**{"none" if method == ZSTD else "old": (method, data)})

    assert NEW == fetch(downloads, wanted)
    assert ["NEW"] == paths(running)[1:]
    assert [".ewb"] == device.left()
    assert 1 == len(device.told)
    assert "comes whole" in device.told[0]
    assert says in device.told[0]


def test_a_delta_that_failed_is_not_fetched_again_after_a_restart(device: Device, running: Book) -> None:
    data = flipped(GOOD[BSDIFF][1])
    running.answer = serve({BSDIFF: data}, whole=b"")
    wanted = target(old=(BSDIFF, data))
    with pytest.raises(Weather, match="before the end"):
        fetch(device.downloads(), wanted)
    running.answer = serve({BSDIFF: data})

    assert NEW == fetch(device.downloads(), wanted)
    assert 1 == sum("from=" in path for path in paths(running))


def test_bytes_that_are_not_the_signed_delta_are_not_even_applied(device: Device, running: Book) -> None:
    running.answer = serve({BSDIFF: flipped(GOOD[BSDIFF][1])})

    class Never(RebuildChild):
        def rebuild(self, wanted: Rebuilding) -> str:
            raise AssertionError(wanted)

    assert NEW == fetch(device.downloads(rebuilds=Never()), target(old=(BSDIFF, GOOD[BSDIFF][1])))
    assert "not the signed ones" in device.told[0]


@pytest.mark.parametrize("status", [404, 410, 500, 302])
def test_a_delta_that_the_server_lost_is_no_loss(device: Device, running: Book, status: int) -> None:
    whole = serve({})
    running.answer = lambda request: request.reply(status) if "?" in request.path else whole(request)

    assert NEW == fetch(device.downloads(), target(old=GOOD_OLD))
    assert ["NEW?from=OLD&method=bsdiff", "NEW"] == paths(running)


def test_a_busy_server_is_waited_for_with_a_delta_too(device: Device, running: Book) -> None:
    running.answer = lambda request: request.reply(503, Retry_After="9")

    with pytest.raises(Weather) as weather:
        fetch(device.downloads(), target(old=GOOD_OLD))

    assert 9.0 == weather.value.retry_after
    assert [] == device.told


def test_a_base_that_is_not_here_or_was_changed_on_disk_is_no_base(device: Device, running: Book) -> None:
    running.answer = serve({BSDIFF: GOOD_OLD[1]})
    (device.folder.parent / "models" / OLD_SHA / "model.tflite").write_bytes(b"changed")

    assert NEW == fetch(device.downloads(), target(old=GOOD_OLD))
    assert "cannot be packed again" in device.told[0]
    assert NEW == fetch(device.downloads(base=lambda _: None), target(old=GOOD_OLD))


def test_a_device_without_decoders_or_without_deltas_fetches_whole(device: Device, running: Book) -> None:
    assert NEW == fetch(device.downloads(rebuilds=None), target(old=GOOD_OLD))
    assert ["NEW"] == paths(running)


def test_a_rebuild_that_hangs_or_dies_says_so(device: Device, tmp_path: Path) -> None:
    (tmp_path / "delta").write_bytes(GOOD_OLD[1])
    wanted = Rebuilding(
        method=BSDIFF,
        base=OLD_SHA,
        folder=device.base(OLD_SHA) or "",
        delta=str(tmp_path / "delta"),
        made=str(tmp_path / "made"),
        length=len(NEW),
    )
    assert "not done within" in RebuildChild(wall_seconds=0.01).rebuild(wanted)
    assert "ended with" in RebuildChild(python="/bin/false").rebuild(wanted)
    assert "" == RebuildChild().rebuild(wanted)
    assert DELTA_METHODS == installed_methods()


# ---------------------------------------------------------------- mirrors
@pytest.fixture
def mirrors(two_mirrors: tuple[Book, Book]) -> tuple[Book, Book]:
    for book in two_mirrors:
        book.seen.clear()
        book.answer = serve({})
    return two_mirrors


def mirrored(device: Device, mirrors: tuple[Book, Book], **parts: object) -> BundleDownloads:
    return device.downloads(mirrors=[Mirror(f"{book.url}/ewb/") for book in mirrors], **parts)


def test_the_first_mirror_is_asked_without_a_token(device: Device, running: Book, mirrors: tuple[Book, Book]) -> None:
    assert NEW == fetch(mirrored(device, mirrors))
    (path, headers) = mirrors[0].seen[0]
    assert f"/ewb/{NEW_SHA}.ewb" == path
    assert "Authorization" not in headers
    assert [] == running.seen + mirrors[1].seen


def cuts(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(NEW)))
    request.end_headers()
    request.wfile.write(NEW[:70_000])
    request.close_connection = True


PASSED_OVER: list[tuple[str, Callable[[Request], None]]] = [
    ("does not have it", lambda request: request.reply(404)),
    ("is broken", lambda request: request.reply(500)),
    ("is busy", lambda request: request.reply(503, Retry_After="3600")),
    ("sends elsewhere", lambda request: request.reply(302, Location="http://127.0.0.1:1/")),
    ("wants a password", lambda request: request.reply(401)),
]


@pytest.mark.parametrize("answer", [row[1] for row in PASSED_OVER], ids=[row[0] for row in PASSED_OVER])
def test_a_mirror_that_cannot_is_passed_over_in_order(
    device: Device, running: Book, mirrors: tuple[Book, Book], answer: Callable[[Request], None]
) -> None:
    mirrors[0].answer = mirrors[1].answer = answer

    assert NEW == fetch(mirrored(device, mirrors))
    assert [1, 1, 1] == [len(book.seen) for book in (*mirrors, running)]


def test_what_a_mirror_sent_before_it_broke_off_is_kept(
    device: Device, running: Book, mirrors: tuple[Book, Book]
) -> None:
    mirrors[0].answer = cuts

    assert NEW == fetch(mirrored(device, mirrors))
    assert "bytes=70000-" == mirrors[1].seen[0][1]["Range"]
    assert [] == running.seen


LIES: list[tuple[str, Callable[[Request], None]]] = [
    ("other bytes", lambda request: request.reply(200, bytes(len(NEW)))),
    ("more bytes", lambda request: request.reply(200, NEW + b"!")),
    ("one bit", serve({}, whole=flipped(NEW))),
]


@pytest.mark.parametrize("answer", [row[1] for row in LIES], ids=[row[0] for row in LIES])
def test_a_mirror_that_lies_is_found_out_by_the_hash_and_asked_no_more(
    device: Device, running: Book, mirrors: tuple[Book, Book], answer: Callable[[Request], None]
) -> None:
    mirrors[0].answer = mirrors[1].answer = answer
    downloads = mirrored(device, mirrors)

    assert NEW == fetch(downloads)
    assert 2 == len(device.told)
    downloads.discard(NEW_SHA)
    assert NEW == fetch(downloads)
    assert [1, 1, 2] == [len(book.seen) for book in (*mirrors, running)]


def test_where_mirrors_and_server_have_nothing_the_server_s_word_is_final(
    device: Device, running: Book, mirrors: tuple[Book, Book]
) -> None:
    for book in (*mirrors, running):
        book.answer = lambda request: request.reply(410)

    with pytest.raises(Refusal) as refused:
        fetch(mirrored(device, mirrors))

    assert RejectReason.UNREACHABLE is refused.value.reason


@pytest.mark.parametrize("url", ["ftp://cache", "cache.lan", "http://", "http://u:p@cache/", "http://cache/?a=b"])
def test_only_a_plain_address_is_a_mirror(url: str) -> None:
    with pytest.raises(Trouble, match="not a mirror's address"):
        Mirror(url)


# ---------------------------------------------------------------- budget and pace
def test_a_budget_stops_in_the_middle_says_so_and_goes_on_after_midnight(device: Device, running: Book) -> None:
    budget = 100_000
    with pytest.raises(Postponed) as postponed:
        fetch(device.downloads(allowance=device.allowance(bytes_per_day=budget)))
    assert 12 * 3600 <= (postponed.value.retry_after or 0) <= 12 * 3600 + 900
    assert budget == (device.folder / f"{NEW_SHA}.part").stat().st_size
    assert 1 == len(device.told)
    assert "after midnight UTC" in device.told[0]
    asked = len(running.seen)

    device.clock.now += 3600_000  # an hour later, also after a restart: not one request
    with pytest.raises(Postponed):
        fetch(device.downloads(allowance=device.allowance(bytes_per_day=budget)))
    assert asked == len(running.seen)

    device.clock.now += 12 * 3600_000
    assert NEW == fetch(device.downloads(allowance=device.allowance(bytes_per_day=budget)))
    assert f"bytes={budget}-" == running.seen[-1][1]["Range"]


def test_a_delta_fits_into_a_budget_that_the_bundle_does_not(device: Device, running: Book) -> None:
    running.answer = serve({BSDIFF: GOOD_OLD[1]})
    downloads = device.downloads(allowance=device.allowance(bytes_per_day=len(GOOD_OLD[1])))

    assert NEW == fetch(downloads, target(old=GOOD_OLD))


def test_a_forced_download_knows_no_budget(device: Device) -> None:
    allowance = device.allowance(bytes_per_day=10)

    assert NEW == fetch(device.downloads(allowance=allowance, is_forced=lambda _: True))


def test_what_was_booked_ahead_and_did_not_come_is_given_back(device: Device) -> None:
    fetch(device.downloads(allowance=device.allowance(bytes_per_day=10 * AHEAD)))
    kept = msgspec.json.decode((device.folder.parent / "ledger.json").read_bytes())

    assert len(NEW) - 65_536 <= kept["spent"] <= len(NEW)


def test_a_ledger_that_cannot_be_read_begins_anew(device: Device) -> None:
    (device.folder.parent / "ledger.json").write_bytes(b"\0\0")

    assert NEW == fetch(device.downloads(allowance=device.allowance(bytes_per_day=10**9)))


def test_the_bandwidth_is_kept_to(device: Device) -> None:
    """On a clock that only sleeping moves: the bundle takes as long as its bytes, less one second's burst."""
    rate = 50_000
    fetch(device.downloads(allowance=device.allowance(bandwidth=rate)))

    expected = len(NEW) / rate - 1
    assert expected - 0.5 <= sum(device.clock.slept) <= expected + 0.5
    assert max(device.clock.slept) <= 0.25


# ---------------------------------------------------------------- waiting, telling, room, turns, kills
def test_a_new_download_is_spread_once(device: Device, running: Book) -> None:
    downloads = device.downloads(spread=lambda: 30.0)
    with pytest.raises(Postponed) as postponed:
        fetch(downloads)
    assert 30.0 == postponed.value.retry_after
    assert [] == running.seen

    assert NEW == fetch(downloads)


def test_progress_is_told_while_it_takes_its_time(device: Device) -> None:
    clock = device.clock

    def step(_: int) -> None:
        clock.now += 3_000  # each of the three chunks; told at most once in ten seconds

    device.downloads(allowance=device.allowance(bandwidth=20_000)).fetch(target(), step, lambda: False)

    shares = [int(detail.split(" %")[0]) for detail in device.told]
    assert sorted(shares) == shares
    assert 2 <= len(shares) <= 4


def test_room_is_needed_for_the_extracted_bundle_too(device: Device, running: Book) -> None:
    with pytest.raises(Refusal) as refused:
        fetch(device.downloads(free=lambda _: RESERVE + 2 * len(NEW) - 1))

    assert RejectReason.NO_SPACE is refused.value.reason
    assert [] == running.seen


def test_one_download_at_a_time_and_one_that_is_not_wanted_leaves_the_queue(device: Device, running: Book) -> None:
    started, go_on = threading.Event(), threading.Event()
    whole = serve({})

    def slow(request: Request) -> None:
        started.set()
        assert go_on.wait(20)
        whole(request)

    running.answer = slow
    downloads = device.downloads()
    first = threading.Thread(target=lambda: fetch(downloads))
    first.start()
    try:
        assert started.wait(20)
        with pytest.raises(Weather, match="waited for its turn"):
            downloads.fetch(target(), lambda _: None, lambda: True)
    finally:
        go_on.set()
        first.join()
    assert NEW == fetch(downloads)
    assert 1 == len(running.seen)


KILLED = textwrap.dedent("""
    import sys
    from pathlib import Path
    from agent.adapters.allowance import Allowance
    from agent.adapters.download import BundleDownloads
    from agent.adapters.https import HttpsServer
    from agent.adapters.identity import context_for
    from protocol.bundle import read_manifest
    from protocol.release import Assignment, release_of
    from agent.ports import Target
    url, ca, folder, sha, length, sample = sys.argv[1:]
    context = context_for(Path(ca).read_text())
    release = release_of(read_manifest(open(sample, "rb")))
    target = Target(release=release, assignment=Assignment(rollout="r"), sha256=sha, length=int(length))
    downloads = BundleDownloads(
        HttpsServer(url, tls=lambda: context), Path(folder),
        allowance=Allowance(Path(folder).parent / "ledger.json", bytes_per_day=10**9),
    )
    downloads.fetch(target, lambda done: print(done, flush=True), lambda: False)
""")


def test_a_killed_download_goes_on_from_its_last_byte(
    device: Device, running: Book, authority: Authority, tmp_path: Path
) -> None:
    killed = threading.Event()

    def half(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(NEW)))
        request.end_headers()
        request.wfile.write(NEW[:70_000])
        killed.wait(20)
        request.close_connection = True

    running.answer = half
    (tmp_path / "ca.pem").write_text(authority.pem)
    arguments = [running.url, tmp_path / "ca.pem", device.folder, NEW_SHA, len(NEW), tmp_path / "old.ewb"]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as child:
        assert child.stdout
        while int(child.stdout.readline()) < 70_000:
            pass
        child.send_signal(signal.SIGKILL)
    killed.set()
    held = (device.folder / f"{NEW_SHA}.part").stat().st_size
    running.answer = serve({})

    assert NEW == fetch(device.downloads())
    assert 0 < held <= 70_000
    assert f"bytes={held}-" == running.seen[-1][1]["Range"]
    spent = msgspec.json.decode((tmp_path / "ledger.json").read_bytes())["spent"]
    assert spent >= held, "a kill never makes the budget larger"


# ---------------------------------------------------------------- settings
WRONG = [
    ("bandwidth = 1023", "bandwidth: 1023 is below 1024"),
    ('mirrors = ["ftp://cache"]', "does not look like http://host/folder"),
    ('mirrors = ["http://u:p@cache"]', "does not look like http://host/folder"),
]


@pytest.mark.parametrize(("line", "says"), WRONG)
def test_settings_that_could_not_work_are_refused_at_the_start(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "agent.toml").write_text(f"[update]\n{line}\n")

    with pytest.raises(BadSettings, match=says):
        load_settings(tmp_path / "agent.toml")
