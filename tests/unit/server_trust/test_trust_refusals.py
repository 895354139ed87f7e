"""What the server does not take, and that a refusal leaves no trace."""

from collections.abc import Callable
from datetime import timedelta

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from trust_world import World, bundle_bytes, chunks, no_passphrase, now_ms, source
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, TargetFile, Targets

from fleet_server.adapters.director import OnlineDirector
from fleet_server.api_types import OnlineKeysView, Publication
from fleet_server.cli.key_folder import IMAGE_TARGETS, KeyFolder
from fleet_server.cli.signing import now_utc, sign_first
from fleet_server.publishing import Refused
from protocol.bundle import digest_of
from protocol.release import bundle_path, release_of, to_custom


class Draft:
    """Targets n+1 in the making: one new bundle of digits 2 on top of the published digits 1."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.source = source(content=b"two")
        self.bundle = bundle_bytes(self.source, 2)
        self.upload: bytes | None = self.bundle
        self.signer = world.keys.signer(IMAGE_TARGETS, no_passphrase)
        self.targets = Metadata[Targets].from_bytes(world.image.metadata("targets.json") or b"").signed
        self.targets.version += 1
        self.targets.expires = now_utc() + timedelta(days=90)
        self.add(self.bundle)

    def add(self, data: bytes, *, path: str | None = None, length: int | None = None, **changes: object) -> None:
        release = release_of(msgspec.structs.replace(self.source.manifest, version=2))
        custom = {**to_custom(release), **changes}
        self.targets.targets[path or bundle_path(release)] = TargetFile(
            len(data) if length is None else length,
            {"sha256": digest_of(data)},
            path or bundle_path(release),
            {"custom": {"release": custom}},
        )

    @property
    def old(self) -> TargetFile:
        return self.targets.targets["models/main/digits-1-int8.ewb"]

    def publish(self) -> object:
        if self.upload is not None:
            self.world.publishing.upload(chunks(self.upload), digest_of(self.upload))
        metadata = Metadata(self.targets)
        metadata.sign(self.signer)
        return self.world.publishing.publish(Publication(targets=metadata.to_bytes()), now_ms())


def wrong_key(d: Draft) -> None:
    d.signer = CryptoSigner.generate_ed25519()


def same_version(d: Draft) -> None:
    d.targets.version -= 1


def skipped_version(d: Draft) -> None:
    d.targets.version += 1


def expired(d: Draft) -> None:
    d.targets.expires = now_utc() - timedelta(seconds=5)


def lives_too_long(d: Draft) -> None:
    d.targets.expires = now_utc() + timedelta(days=92)


def never_uploaded(d: Draft) -> None:
    d.upload = None


def other_bytes_uploaded(d: Draft) -> None:
    d.upload = bundle_bytes(source(content=b"other"), 2)


def wrong_length(d: Draft) -> None:
    d.add(d.bundle, length=len(d.bundle) + 1)


def bundle_of_other_version(d: Draft) -> None:
    d.upload = bundle_bytes(d.source, 3)
    d.add(d.upload)


def bundle_says_other_release(d: Draft) -> None:
    d.upload = bundle_bytes(source(content=b"two", title="another"), 2)
    d.add(d.upload)


def published_bundle_repointed(d: Draft) -> None:
    d.old.hashes["sha256"] = "0" * 64


def published_release_changed(d: Draft) -> None:
    d.old.unrecognized_fields["custom"]["release"]["title"] = "new name"


def published_bundle_gone(d: Draft) -> None:
    del d.targets.targets["models/main/digits-1-int8.ewb"]


def path_of_another_release(d: Draft) -> None:
    d.targets.targets.pop("models/main/digits-2-int8.ewb")
    d.add(d.bundle, path="models/main/digits-9-int8.ewb")


def path_outside_models(d: Draft) -> None:
    d.add(d.bundle, path="../etc/passwd")


def no_release(d: Draft) -> None:
    d.targets.targets["models/main/digits-2-int8.ewb"].unrecognized_fields.clear()


def unknown_field_in_release(d: Draft) -> None:
    d.add(d.bundle, surprise=1)


def two_families(d: Draft) -> None:
    d.add(d.bundle, path="models/other/digits-2-int8.ewb", family="other")


def older_than_what_exists(d: Draft) -> None:
    late = source(content=b"late", variant="fp32")
    d.upload = bundle_bytes(late, 1)
    release = release_of(msgspec.structs.replace(late.manifest, version=1))
    d.targets.targets[bundle_path(release)] = TargetFile(
        len(d.upload),
        {"sha256": digest_of(d.upload)},
        bundle_path(release),
        {"custom": {"release": to_custom(release)}},
    )


def delegating(d: Draft) -> None:
    d.targets.delegations = Delegations({}, {"vision": DelegatedRole("vision", [], 1, True, ["models/vision/*"])})


def floor_without_number(d: Draft) -> None:
    d.targets.targets["models/main/digits.floor"] = TargetFile(0, {"sha256": digest_of(b"")}, "x", {})


REFUSED: list[tuple[Callable[[Draft], None], str]] = [
    (wrong_key, "not signed as root 1 requires"),
    (same_version, "version 2 came, 3 is next"),
    (skipped_version, "version 4 came, 3 is next"),
    (expired, "expired at"),
    (lives_too_long, "more than 90 days"),
    (never_uploaded, "was not uploaded"),
    (other_bytes_uploaded, "was not uploaded"),
    (wrong_length, "bytes, .* were signed"),
    (bundle_of_other_version, "manifest says version 3, signed was 2"),
    (bundle_says_other_release, "another release than was signed"),
    (published_bundle_repointed, "never changes"),
    (published_release_changed, "never changes"),
    (published_bundle_gone, "is missing now"),
    (path_of_another_release, "belongs to models/main/digits-2-int8.ewb"),
    (path_outside_models, "neither the path of a bundle"),
    (no_release, "custom.release"),
    (unknown_field_in_release, "fields or forms"),
    (two_families, "belongs to family main"),
    (older_than_what_exists, "version 1 is not above 1"),
    (delegating, "0 keys cannot give 1 signatures"),
    (floor_without_number, "custom.floor"),
]


@pytest.mark.parametrize(("spoil", "reason"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
def test_a_spoilt_publication_is_refused_with_its_reason_and_leaves_no_trace(
    ready: World, spoil: Callable[[Draft], None], reason: str
) -> None:
    ready.publish(source(content=b"one"))
    before = (ready.image.metadata("timestamp.json"), ready.releases.bundles())
    draft = Draft(ready)
    spoil(draft)
    with pytest.raises(Refused, match=reason):
        draft.publish()
    assert (ready.image.metadata("timestamp.json"), ready.releases.bundles()) == before


def test_the_same_draft_unspoilt_is_taken_and_taken_again_without_a_change(ready: World) -> None:
    ready.publish(source(content=b"one"))
    draft = Draft(ready)
    assert [b.path for b in draft.publish()] == ["models/main/digits-2-int8.ewb"]
    before = ready.image.metadata("timestamp.json")
    assert draft.publish() == []
    assert ready.image.metadata("timestamp.json") == before


def test_a_floor_may_rise_and_never_falls(ready: World) -> None:
    def with_floor(floor: int) -> Draft:
        draft, old = Draft(ready), Metadata[Targets].from_bytes(ready.image.metadata("targets.json") or b"").signed
        draft.targets.targets = dict(old.targets)
        path = "models/main/digits.floor"
        draft.targets.targets[path] = TargetFile(0, {"sha256": digest_of(b"")}, path, {"custom": {"floor": floor}})
        return draft

    for content in (b"one", b"two", b"three"):
        ready.publish(source(content=content))
    with_floor(2).publish()
    with_floor(3).publish()
    with pytest.raises(Refused, match="falls from 3 to 2"):
        with_floor(2).publish()
    with pytest.raises(Refused, match="floor 4 is above 3"):
        with_floor(4).publish()


def test_variants_of_a_new_version_come_in_one_publication(ready: World) -> None:
    ready.publish(source(content=b"one"))
    both = ready.publish(source(content=b"two"), source(content=b"two", variant="fp32"))
    assert [(p.version, p.variant) for p in both] == [(2, "int8"), (2, "fp32")]


def test_what_was_signed_but_not_yet_in_the_database_is_caught_up_at_start(ready: World) -> None:
    ready.publish(source())
    ready.releases.stored.clear()
    ready.publishing.catch_up(now_ms())
    assert [b.path for b in ready.releases.bundles()] == ["models/main/digits-1-int8.ewb"]


# ---------------------------------------------------------------- uploads
@pytest.mark.parametrize(
    ("data", "claimed", "reason"),
    [
        (b"bytes", digest_of(b"others"), "have SHA-256"),
        (b"bytes", "../../etc/passwd", "not a SHA-256"),
        (b"bytes", digest_of(b"bytes"), "not a readable bundle"),
    ],
    ids=["other bytes", "no digest", "not a bundle"],
)
def test_a_bad_upload_is_refused(ready: World, data: bytes, claimed: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        ready.publishing.upload(chunks(data), claimed)


def test_an_upload_over_the_cap_stops_at_the_cap_and_leaves_nothing(ready: World) -> None:
    taken = []

    def endless() -> object:
        while True:
            taken.append(1)
            yield b"x" * 100

    with pytest.raises(Refused, match="over the cap of 1000"):
        ready.artifacts.add(endless(), digest_of(b""), cap=1000)
    assert len(taken) == 11
    assert list((ready.folder / "artifacts").iterdir()) == []


def test_a_stored_bundle_can_be_read_by_its_digest_only(ready: World) -> None:
    ready.artifacts.add(iter([b"by", b"tes"]), digest_of(b"bytes"), cap=10)
    with ready.artifacts.open(digest_of(b"bytes")) as stored:
        assert stored.read() == b"bytes"
    assert ready.artifacts.length(digest_of(b"bytes")) == 5
    assert ready.artifacts.length(digest_of(b"absent")) is None
    for missing in (digest_of(b"absent"), "../artifacts"):
        with pytest.raises(KeyError):
            ready.artifacts.open(missing)


def test_what_a_cut_upload_left_is_removed_at_start(ready: World) -> None:
    (ready.folder / "artifacts/.incoming-abc").write_bytes(b"half")
    ready.restart()
    assert list((ready.folder / "artifacts").iterdir()) == []


# ---------------------------------------------------------------- roots
def test_roots_for_other_online_keys_are_refused_and_the_right_ones_still_fit(world: World) -> None:
    strange = OnlineDirector(world.folder / "strange")
    right = world.client.get("/trust/online-keys", OnlineKeysView)
    wrong = OnlineKeysView(director={r: k.decode() for r, k in strange.online_keys().items()}, image=right.image)
    for name, view in (("WRONG", wrong), ("RIGHT", right)):
        keys = KeyFolder(world.folder / name)
        keys.make_keys(None)
        roots = sign_first(keys, view, no_passphrase, now_utc())
        if view is wrong:
            with pytest.raises(Refused, match="must name this server's key"):
                world.publishing.accept_roots(roots, now_ms())
            assert world.image.first_root() is None
        else:
            world.publishing.accept_roots(roots, now_ms())
    assert world.image.first_root() == roots.image_root


def test_the_same_roots_again_change_nothing_and_other_roots_are_refused(ready: World) -> None:
    roots = ready.keys.signed_roots()
    ready.publishing.accept_roots(roots, now_ms())
    assert len(ready.director.roots()) == 1
    other = World(ready.folder / "other").ready().keys.signed_roots()
    with pytest.raises(Refused):
        ready.publishing.accept_roots(other, now_ms())


def test_the_next_root_must_be_signed_by_the_one_before(ready: World) -> None:
    root = Metadata[Root].from_bytes(ready.director.roots()[0])
    stranger = CryptoSigner.generate_ed25519()
    root.signed.version = 2
    root.signed.add_key(stranger.public_key, "root")
    root.sign(stranger)
    with pytest.raises(Refused, match="not signed as root 1 requires"):
        ready.director.accept_root(root.to_bytes())


@pytest.mark.parametrize("junk", [b"", b"{}", b"[" * 16000, b"\xff\xfe", b'{"signed":NaN}', b"x" * 600_000])
def test_junk_is_refused_as_root_and_as_targets(ready: World, junk: bytes) -> None:
    with pytest.raises(Refused):
        ready.director.accept_root(junk)
    with pytest.raises(Refused):
        ready.image.accept(Publication(targets=junk), now_ms())


def test_a_fraction_in_signed_metadata_is_refused_because_tuf_cannot_sign_it(ready: World) -> None:
    data = msgspec.json.decode(ready.image.metadata("targets.json") or b"")
    data["signed"]["custom"] = 0.5
    with pytest.raises(Refused):
        ready.image.accept(Publication(targets=msgspec.json.encode(data)), now_ms())


def test_metadata_is_served_by_its_own_names_only(ready: World) -> None:
    assert ready.image.metadata("root.json") == ready.image.metadata("1.root.json")
    for name in ("../snapshot.pem", "snapshot.pem", "0.root.json", "2.root.json", "", "01.targets.json"):
        assert ready.image.metadata(name) is None, name
