import io
import struct
import zipfile
from collections.abc import Callable
from typing import IO

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.bundle import BadBundle, digest_of, digest_of_stream, read_manifest, unpack, write_bundle
from protocol.manifest import (
    MANIFEST_NAME,
    BadManifest,
    Calibrator,
    Golden,
    Manifest,
    Needs,
    TensorSpec,
    check_manifest,
    decode_manifest,
    encode_manifest,
)
from protocol.names import MAX_MANIFEST, MAX_MEMBERS
from protocol.states import Task

MEMBERS = {"model.tflite": b"model" * 100, "golden.npz": b"samples"}


def manifest_for(members: dict[str, bytes]) -> Manifest:
    return Manifest(
        model="digits",
        inputs=(TensorSpec(name="i", dtype="INT8", shape=(-1, 4)),),
        outputs=(TensorSpec(name="o", dtype="INT8", shape=(-1, 2)),),
        classes=("a", "b"),
        needs=Needs(memory=1),
        golden=Golden(samples=1, tolerance=0.0),
        members={name: digest_of(data) for name, data in members.items()},
    )


MANIFEST = manifest_for(MEMBERS)


def written(manifest: Manifest = MANIFEST, members: dict[str, bytes] = MEMBERS) -> bytes:
    target = io.BytesIO()
    write_bundle(target, manifest, members)
    return target.getvalue()


class Folder:
    """Where `unpack` writes to; remembers what it was given."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def open(self, name: str) -> IO[bytes]:
        folder = self

        class Target(io.BytesIO):
            def close(self) -> None:
                folder.files[name] = self.getvalue()
                super().close()

        return Target()


def unpacked(bundle: bytes) -> tuple[Manifest, dict[str, bytes]]:
    folder = Folder()
    manifest = unpack(io.BytesIO(bundle), folder.open)
    return manifest, folder.files


# ---------------------------------------------------------------- round trip
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True).filter(lambda name: name != MANIFEST_NAME)


@given(st.dictionaries(names, st.binary(max_size=100), max_size=5))
def test_what_is_packed_is_unpacked(extra: dict[str, bytes]) -> None:
    members = {**extra, **MEMBERS}
    manifest = manifest_for(members)
    bundle = written(manifest, members)
    assert (manifest, {MANIFEST_NAME: encode_manifest(manifest), **members}) == unpacked(bundle)
    assert manifest == read_manifest(io.BytesIO(bundle))


def test_the_same_content_is_the_same_bytes() -> None:
    assert written() == written(members=dict(reversed(MEMBERS.items())))


def test_a_stream_is_hashed_to_its_end() -> None:
    data = b"x" * 3_000_000
    assert digest_of(data) == digest_of_stream(io.BytesIO(data))


@pytest.mark.parametrize("members", [{}, {**MEMBERS, "more": b""}, {**MEMBERS, "golden.npz": b"other"}])
def test_only_the_members_of_the_manifest_are_packed(members: dict[str, bytes]) -> None:
    with pytest.raises(BadBundle):
        written(members=members)


# ---------------------------------------------------------------- hostile bundles
def zipped(
    *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED, manifest: bytes | None = encode_manifest(MANIFEST)
) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        if manifest is not None:
            archive.writestr(MANIFEST_NAME, manifest)
        for name, data in members:
            archive.writestr(name, data)
    return target.getvalue()


def with_duplicate() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate"):
        return zipped(*MEMBERS.items(), ("golden.npz", b"samples"))


def with_encryption_flag() -> bytes:
    bundle = bytearray(written())
    at = bundle.rindex(b"PK\x01\x02")
    bundle[at + 8] |= 1
    return bytes(bundle)


def with_a_longer_member() -> bytes:
    """The directory says more bytes than the container holds."""
    bundle = bytearray(written())
    at = bundle.rindex(b"PK\x01\x02")
    struct.pack_into("<II", bundle, at + 20, 10_000_000, 10_000_000)
    return bytes(bundle)


def with_a_promise_of_terabytes() -> bytes:
    bundle = bytearray(written())
    for _ in range(2):
        at = bundle.rindex(b"PK\x01\x02")
        struct.pack_into("<II", bundle, at + 20, 0xFFFFFFFE, 0xFFFFFFFE)
    return bytes(bundle)


def with_a_flipped_bit() -> bytes:
    return written().replace(b"modelmodel", b"modelmodeL", 1)


def listing_itself() -> bytes:
    listed = msgspec.structs.replace(MANIFEST, members={**MANIFEST.members, MANIFEST_NAME: "a" * 64})
    return zipped(*MEMBERS.items(), manifest=encode_manifest(listed))


PAIRS = tuple(MEMBERS.items())
HOSTILE: list[tuple[str, Callable[[], bytes]]] = [
    ("nothing", lambda: b""),
    ("not a container", lambda: b"PK\x03\x04 and then nothing of the kind" * 10),
    ("a compressed member", lambda: zipped(*PAIRS, method=zipfile.ZIP_DEFLATED)),
    ("a name that climbs", lambda: zipped(*PAIRS, ("../evil", b""))),
    ("an absolute name", lambda: zipped(*PAIRS, ("/etc/passwd", b""))),
    ("a folder", lambda: zipped(*PAIRS, ("folder/", b""))),
    ("a hidden file", lambda: zipped(*PAIRS, (".profile", b""))),
    ("a name that is not ASCII", lambda: zipped(*PAIRS, ("mödel", b""))),
    ("a member twice", with_duplicate),
    ("a member too many", lambda: zipped(*PAIRS, ("extra", b""))),
    ("a member too few", lambda: zipped(PAIRS[0])),
    ("members without end", lambda: zipped(*PAIRS, *[(f"m{k}", b"") for k in range(MAX_MEMBERS)])),
    ("a member of another hash", lambda: zipped(PAIRS[0], ("golden.npz", b"tampered"))),
    ("no manifest", lambda: zipped(*PAIRS, manifest=None)),
    ("a manifest that is no manifest", lambda: zipped(*PAIRS, manifest=b"{}")),
    ("a manifest that nests", lambda: zipped(*PAIRS, manifest=b'{"lineage":' + b"[" * 100_000)),
    ("a manifest that lists itself", listing_itself),
    ("a manifest over the cap", lambda: zipped(*PAIRS, manifest=b" " * (MAX_MANIFEST + 1))),
    ("a container cut short", lambda: written()[:-40]),
    ("a container without its beginning", lambda: written()[40:]),
    ("an encrypted member", with_encryption_flag),
    ("a directory that promises more", with_a_longer_member),
    ("a directory that promises terabytes", with_a_promise_of_terabytes),
    ("a flipped bit", with_a_flipped_bit),
]


@pytest.mark.parametrize("make", [case[1] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_bundles_are_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(BadBundle):
        unpacked(make())


@given(st.data())
def test_a_damaged_bundle_is_refused_or_whole(data: st.DataObject) -> None:
    bundle = bytearray(written())
    for _ in range(data.draw(st.integers(1, 4))):
        bundle[data.draw(st.integers(0, len(bundle) - 1))] = data.draw(st.integers(0, 255))
    try:
        _, files = unpacked(bytes(bundle))
    except BadBundle:
        return
    assert MEMBERS == {name: content for name, content in files.items() if name != MANIFEST_NAME}


def test_a_disk_that_refuses_is_not_the_bundles_fault() -> None:
    def full(name: str) -> IO[bytes]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        unpack(io.BytesIO(written()), full)


# ---------------------------------------------------------------- manifests
CHANGES: list[tuple[str, dict[str, object], str]] = [
    ("another format", {"format": 2}, "format 2"),
    ("a model name in capitals", {"model": "Digits"}, "model"),
    ("a variant with a slash", {"variant": "a/b"}, "variant"),
    ("a version below 0", {"version": -1}, "version"),
    ("no inputs", {"inputs": ()}, "inputs"),
    ("too few class names", {"classes": ("a",)}, "classes"),
    ("a model that is not among the members", {"model_member": "other"}, "model_member"),
    (
        "golden samples that are not among the members",
        {"golden": Golden(member="x", samples=1, tolerance=0)},
        "golden",
    ),
    ("a member name that climbs", {"members": {**MANIFEST.members, "../x": "a" * 64}}, "members"),
    ("a hash that is none", {"members": {**MANIFEST.members, "x": "a"}}, "members: x"),
    ("itself among the members", {"members": {**MANIFEST.members, MANIFEST_NAME: "a" * 64}}, "itself"),
    ("too many members", {"members": {**MANIFEST.members, **{f"m{k}": "a" * 64 for k in range(99)}}}, "members"),
    ("a calibrator that divides by 0", {"calibrator": Calibrator(temperature=0.0, samples=1)}, "temperature"),
]


@pytest.mark.parametrize(("change", "named"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_a_manifest_that_contradicts_itself_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(BadManifest, match=named):
        check_manifest(msgspec.structs.replace(MANIFEST, **change))


def test_an_unknown_field_is_an_error_that_names_it() -> None:
    data = encode_manifest(MANIFEST).replace(b'"model"', b'"modle"', 1)
    with pytest.raises(BadManifest, match=r"modle|model"):
        decode_manifest(data)


def test_other_tasks_need_no_class_names() -> None:
    check_manifest(msgspec.structs.replace(MANIFEST, task=Task.OTHER, classes=()))
