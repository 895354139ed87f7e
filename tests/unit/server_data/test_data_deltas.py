"""Deltas on the server: made by a child under limits, kept by digest, offered to those that can apply them."""

import hashlib
import io
import random
from collections.abc import Iterator
from pathlib import Path

import bsdiff4
import msgspec
import pytest
import zstandard

from fleet_server.adapters import delta_making
from fleet_server.adapters.artifacts import ArtifactFolder
from fleet_server.adapters.delta_making import MIB, Making, methods_for
from fleet_server.adapters.deltas import DeltaFolder
from fleet_server.core.offering import bases_of, methods_of, pairs_for
from protocol.manifest import Needs, TensorSpec
from protocol.messages import Birth, RunningModel
from protocol.release import BSDIFF, DELTA_METHODS, NO_BASE, ZSTD, ZSTD_PATCH, Release
from protocol.states import DeploymentState

PATIENCE = 60.0  # seconds
OLD = random.Random(3).randbytes(60_000) + bytes(40_000)
NEW = OLD[:30_000] + b"other" + OLD[30_005:]
NOISE = random.Random(4).randbytes(50_000)
TENSOR = TensorSpec(name="x", dtype="INT8", shape=(1, 4))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactFolder:
    folder = ArtifactFolder(tmp_path / "bundles")
    for data in (OLD, NEW, NOISE):
        folder.add(iter([data]), sha(data), cap=10**9)
    return folder


@pytest.fixture
def deltas(tmp_path: Path, artifacts: ArtifactFolder) -> Iterator[DeltaFolder]:
    folder = DeltaFolder(tmp_path / "deltas", artifacts)
    folder.start()
    yield folder
    folder.stop()


def made(deltas: DeltaFolder, base: str, target: str) -> dict[str, bytes]:
    """Have a pair made; return what there is by method, each checked against what is said of it."""
    deltas.prepare([(base, target)])
    assert deltas.settle(PATIENCE)
    found = {}
    for method in DELTA_METHODS:
        try:
            file, delta = deltas.open(base, target, method)
        except KeyError:
            continue
        with file:
            found[method] = file.read()
        assert (delta.length, delta.sha256) == (len(found[method]), sha(found[method]))
    return found


def test_every_method_makes_the_target_from_the_base(deltas: DeltaFolder) -> None:
    found = made(deltas, sha(OLD), sha(NEW))
    assert {ZSTD_PATCH, BSDIFF} == set(found)
    dictionary = zstandard.ZstdCompressionDict(OLD, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    assert NEW == zstandard.ZstdDecompressor(dict_data=dictionary).decompress(found[ZSTD_PATCH])
    assert NEW == bsdiff4.patch(OLD, found[BSDIFF])
    assert max(map(len, found.values())) < 1000

    whole = made(deltas, NO_BASE, sha(NEW))
    assert {ZSTD} == set(whole)
    assert NEW == zstandard.ZstdDecompressor().decompress(whole[ZSTD])


def test_the_smallest_that_a_device_can_apply_is_offered(deltas: DeltaFolder) -> None:
    found = made(deltas, sha(OLD), sha(NEW))
    smallest = min(found, key=lambda method: len(found[method]))
    offer = deltas.offer(sha(OLD), sha(NEW), DELTA_METHODS)
    assert offer is not None
    assert smallest == offer.method
    (other,) = set(found) - {smallest}
    assert other == (deltas.offer(sha(OLD), sha(NEW), [other, "later"]) or offer).method
    assert deltas.offer(sha(OLD), sha(NEW), []) is None
    assert deltas.offer(sha(NEW), sha(OLD), DELTA_METHODS) is None, "nobody asked for that direction"


def test_what_saves_nothing_is_not_offered_and_not_made_twice(deltas: DeltaFolder, tmp_path: Path) -> None:
    assert {} == made(deltas, NO_BASE, sha(NOISE))
    index = tmp_path / "deltas" / f"{sha(NOISE)}.none.json"
    before = index.stat().st_mtime_ns
    assert {} == made(deltas, NO_BASE, sha(NOISE))
    assert before == index.stat().st_mtime_ns


def test_what_was_made_outlives_a_restart(deltas: DeltaFolder, tmp_path: Path, artifacts: ArtifactFolder) -> None:
    offered = made(deltas, sha(OLD), sha(NEW))
    again = DeltaFolder(tmp_path / "deltas", artifacts)
    for method, data in offered.items():
        file, _ = again.open(sha(OLD), sha(NEW), method)
        with file:
            assert data == file.read()


def test_leftovers_of_a_killed_child_are_removed_and_a_damaged_index_is_made_again(
    tmp_path: Path, artifacts: ArtifactFolder
) -> None:
    folder = tmp_path / "deltas"
    folder.mkdir()
    (folder / f"{sha(NEW)}.none.zstd.part").write_bytes(b"half")
    (folder / f"{sha(NEW)}.none.json").write_bytes(b"\x00{")
    deltas = DeltaFolder(folder, artifacts)
    assert [f"{sha(NEW)}.none.json"] == [path.name for path in folder.iterdir()]
    deltas.start()
    try:
        assert {ZSTD} == set(made(deltas, NO_BASE, sha(NEW)))
    finally:
        deltas.stop()


NAMES = [("../../etc/passwd", sha(NEW)), (NO_BASE, "../../etc/passwd"), ("", sha(NEW)), ("f" * 64, sha(NEW))]


@pytest.mark.parametrize(("base", "target"), NAMES)
def test_what_is_no_digest_or_no_bundle_is_neither_made_nor_found(
    deltas: DeltaFolder, tmp_path: Path, base: str, target: str
) -> None:
    deltas.prepare([(base, target)])
    assert deltas.settle(0)
    assert deltas.offer(base, target, DELTA_METHODS) is None
    with pytest.raises(KeyError):
        deltas.open(base, target, ZSTD)
    with pytest.raises(KeyError):
        deltas.open(sha(OLD), sha(NEW), "../x")
    assert [] == list((tmp_path / "deltas").iterdir())


def test_a_bundle_that_was_changed_on_disk_gets_no_delta(
    deltas: DeltaFolder, artifacts: ArtifactFolder, tmp_path: Path
) -> None:
    (tmp_path / "bundles" / f"{sha(NEW)}.ewb").write_bytes(NEW[::-1])
    assert {} == made(deltas, sha(OLD), sha(NEW))


LIMITS = [
    ("memory", {"memory_bytes": 40 * MIB}),
    ("CPU time", {"cpu_seconds": 1}),
    ("wall clock", {"wall_seconds": 1.0}),
]


@pytest.mark.parametrize("limits", [row[1] for row in LIMITS], ids=[row[0] for row in LIMITS])
def test_a_pair_that_takes_too_much_costs_the_child_only(
    tmp_path: Path, artifacts: ArtifactFolder, limits: dict[str, int]
) -> None:
    """20 MB of which a tenth is in the base would be worth it. A small pair is made as ever afterwards."""
    dice = random.Random(5)
    base = dice.randbytes(20 * MIB)
    large = [base, dice.randbytes(18 * MIB) + base[: 2 * MIB]]
    for data in large:
        artifacts.add(iter([data]), sha(data), cap=10**9)
    deltas = DeltaFolder(tmp_path / "deltas", artifacts, **limits)  # type: ignore[arg-type]  # numbers of two types
    deltas.start()
    try:
        assert {} == made(deltas, sha(large[0]), sha(large[1]))
    finally:
        deltas.stop()
    patient = DeltaFolder(tmp_path / "deltas", artifacts)
    patient.start()
    try:
        assert {} == made(patient, sha(large[0]), sha(large[1])), "what could not be made is not tried again"
        assert {ZSTD} == set(made(patient, NO_BASE, sha(NEW)))
    finally:
        patient.stop()


SIZES = [
    ("small pair", MIB, MIB, {ZSTD_PATCH, BSDIFF}),
    ("too much for a suffix array", 30 * MIB, MIB, {ZSTD_PATCH}),
    ("too much for a window", 30 * MIB, 100 * MIB, set()),
    ("100 MB alone", 0, 100 * MIB, {ZSTD}),
    ("a gigabyte alone", 0, 1024 * MIB, set()),
]


@pytest.mark.parametrize(("base", "target", "methods"), [row[1:] for row in SIZES], ids=[row[0] for row in SIZES])
def test_sizes_decide_what_is_tried_at_all(tmp_path: Path, base: int, target: int, methods: set[str]) -> None:
    for name, size in (("base", base), ("target", target)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    making = Making(
        target=str(tmp_path / "target"),
        target_sha256="",
        base=str(tmp_path / "base") if base else "",
        out="",
        memory_bytes=0,
        cpu_seconds=0,
    )
    assert methods == {name for name, _ in methods_for(making)}


def test_the_end_of_the_server_ends_the_child(tmp_path: Path, artifacts: ArtifactFolder) -> None:
    large = random.Random(6).randbytes(20 * MIB)
    artifacts.add(iter([large]), sha(large), cap=10**9)
    deltas = DeltaFolder(tmp_path / "deltas", artifacts)
    deltas.start()
    deltas.prepare([(NO_BASE, sha(large)), (NO_BASE, sha(NEW))])
    deltas.stop()
    assert [] == [path.name for path in (tmp_path / "deltas").glob("*.json")], "it is made when it is asked for again"


def test_the_oldest_go_when_too_much_is_kept(tmp_path: Path, artifacts: ArtifactFolder) -> None:
    deltas = DeltaFolder(tmp_path / "deltas", artifacts, kept_bytes=100)
    deltas.start()
    try:
        assert {} == made(deltas, NO_BASE, sha(NEW))
    finally:
        deltas.stop()
    assert [] == list((tmp_path / "deltas").iterdir())


def test_what_the_child_is_told_is_checked_before_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(msgspec.json.encode({"target": "x"}))

    monkeypatch.setattr(delta_making.sys, "stdin", Stdin)
    with pytest.raises(msgspec.ValidationError, match="target_sha256"):
        delta_making.main()


# ---------------------------------------------------------------- which are worth making, and for whom
def release(version: int, model: str = "digits", variant: str = "int8") -> Release:
    return Release(
        model=model, version=version, variant=variant, inputs=(TENSOR,), outputs=(TENSOR,), needs=Needs(memory=1)
    )


def test_a_new_version_gets_deltas_from_the_newest_three_of_its_variant_and_from_nothing_last() -> None:
    known = [(release(n), f"d{n}") for n in range(1, 7)]
    known += [(release(4, variant="float"), "f4"), (release(4, model="wake"), "w4")]
    assert (("d4", "d5"), ("d3", "d5"), ("d2", "d5"), (NO_BASE, "d5")) == pairs_for([(release(5), "d5")], known)


def birth(*models: tuple[str, str | None], **facts: str) -> Birth:
    running = tuple(
        RunningModel(model=model, state=DeploymentState.COMMITTED, version=1, digest=digest)
        for model, digest in models
    )
    return Birth(boot="b", connection=1, at=0, agent="1", device_class="x", models=running, facts=facts)


BASES = [
    ("a device that was never seen", None, ()),
    ("a device that serves nothing", birth(), (NO_BASE,)),
    ("what it serves", birth(("digits", "old"), ("wake", "w")), ("old", NO_BASE)),
    ("not the target itself", birth(("digits", "new")), (NO_BASE,)),
    ("a model that does not serve", birth(("digits", None)), (NO_BASE,)),
]


@pytest.mark.parametrize(("seen", "bases"), [row[1:] for row in BASES], ids=[row[0] for row in BASES])
def test_what_a_delta_may_start_from_on_a_device(seen: Birth | None, bases: tuple[str, ...]) -> None:
    assert bases == bases_of(seen, "digits", "new")


def test_a_device_that_tells_no_methods_gets_no_deltas() -> None:
    assert () == methods_of(None)
    assert () == methods_of(birth())
    assert (ZSTD, BSDIFF) == methods_of(birth(deltas="zstd bsdiff"))
