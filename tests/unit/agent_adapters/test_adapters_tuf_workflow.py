"""The client workflow of the TUF specification (§5), step by step, through the executable of `tests/conformance`.

The public conformance suite drives the same executable (docs/explanation/trust.md). These tests need nothing of it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Signed
from tuf_simulator import HttpRepository, Repository, http_repository, in_days

EXECUTABLE = Path(__file__).parents[2] / "conformance" / "tuf_client"


def load_executable() -> ModuleType:
    spec = spec_from_loader("tuf_client", SourceFileLoader("tuf_client", str(EXECUTABLE)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tuf_client = load_executable()


class Client:
    """The executable with folders of its own, in this process unless a test wants a real one."""

    def __init__(self, server: HttpRepository, folder: Path) -> None:
        self.server = server
        self.metadata, self.downloads = folder / "metadata", folder / "targets"
        self.metadata.mkdir()

    def init(self, root: bytes) -> int:
        trusted = self.metadata.parent / "trusted.json"
        trusted.write_bytes(root)
        return self._run("init", str(trusted))

    def refresh(self, *, days: float = 0) -> int:
        return self._run("refresh", days=days)

    def download(self, *paths: str) -> int:
        return self._run("download", paths=paths)

    def words(self, *command: str, days: float = 0, paths: tuple[str, ...] = ()) -> list[str]:
        said = ["--metadata-dir", str(self.metadata), "--metadata-url", f"{self.server.url}/metadata/"]
        said += ["--target-base-url", f"{self.server.url}/targets", "--target-dir", str(self.downloads)]
        said += ["--days-in-future", str(days)]
        for path in paths:
            said += ["--target-name", path]
        return [*said, *command]

    def _run(self, *command: str, days: float = 0, paths: tuple[str, ...] = ()) -> int:
        code: int = tuf_client.run(self.words(*command, days=days, paths=paths))
        return code

    def trusts(self, role: str) -> int | None:
        """Return the version of a role that is trusted."""
        path = self.metadata / f"{role}.json"
        return self.signed(path).version if path.exists() else None

    def signed(self, path: Path) -> Signed:
        signed: Signed = Metadata.from_bytes(path.read_bytes()).signed
        return signed

    @property
    def trusted(self) -> tuple[int | None, ...]:
        return tuple(self.trusts(role) for role in ("root", "timestamp", "snapshot", "targets"))

    @property
    def has(self) -> list[bytes]:
        found = sorted(self.downloads.iterdir()) if self.downloads.exists() else []
        return [path.read_bytes() for path in found]


@pytest.fixture(scope="module")
def server() -> Iterator[HttpRepository]:
    with http_repository() as server:
        yield server


def start(server: HttpRepository, folder: Path, repository: Repository) -> Client:
    server.repository = repository
    client = Client(server, folder)
    assert client.init(repository.metadata["1.root.json"]) == 0
    assert repository.asked == []
    return client


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def client(server: HttpRepository, tmp_path: Path, repository: Repository) -> Client:
    client = start(server, tmp_path, repository)
    assert client.refresh() == 0
    return client


# ---------------------------------------------------------------- what is accepted
@pytest.mark.parametrize("hashes", [False, True], ids=["versions only", "with hashes"])
@pytest.mark.parametrize("consistent", [False, True], ids=["plain names", "consistent snapshot"])
def test_a_repository_is_read_and_a_target_fetched_once(
    server: HttpRepository, tmp_path: Path, consistent: bool, hashes: bool
) -> None:
    repository = Repository(consistent=consistent, hashes=hashes)
    repository.add("targets", "a/b.txt", b"first")
    repository.release("targets")
    client = start(server, tmp_path, repository)

    assert client.download("a/b.txt") == 0

    number = "2." if consistent else ""
    name = f"a/{sha256(b'first').hexdigest()}.b.txt" if consistent else "a/b.txt"
    expected = ["2.root.json", "timestamp.json", f"{number}snapshot.json", f"{number}targets.json", name]
    assert repository.asked == expected
    assert client.download("a/b.txt") == 0
    assert repository.asked[5:] == ["2.root.json", "timestamp.json"]
    assert client.has == [b"first"]
    repository.add("targets", "a/b.txt", b"second")
    repository.release("targets")
    assert client.download("a/b.txt") == 0
    assert client.has == [b"second"]


def test_what_is_kept_is_what_was_served_byte_for_byte(client: Client, repository: Repository) -> None:
    assert (client.metadata / "timestamp.json").read_bytes() == repository.metadata["timestamp.json"]
    assert (client.metadata / "root.json").read_bytes() == repository.metadata["1.root.json"]


def test_unrecognised_fields_count_for_the_signature_and_stop_nothing(client: Client, repository: Repository) -> None:
    for role in (repository.root, repository.timestamp, repository.snapshot, repository.targets):
        role.unrecognized_fields["x-new"] = {"list": [1, None, "é"]}
    repository.put_root()
    repository.release("targets")

    assert client.refresh() == 0
    assert client.trusted == (2, 2, 2, 2)
    assert json.loads((client.metadata / "targets.json").read_bytes())["signed"]["x-new"]["list"] == [1, None, "é"]


@pytest.mark.parametrize("make", ["ed25519", "ecdsa", "rsa"])
def test_keys_of_each_kind_are_understood(client: Client, repository: Repository, make: str) -> None:
    signer = getattr(CryptoSigner, f"generate_{make}")()
    repository.root.add_key(signer.public_key, "timestamp")
    repository.root.roles["timestamp"].threshold = 2
    repository.signers["timestamp"].append(signer)
    repository.put_root()
    repository.release()

    assert client.refresh() == 0


def test_roles_with_awkward_names_stay_inside_the_folder(client: Client, repository: Repository) -> None:
    names = ["../escape", "a/b", "with space", "50%", "5.root", "🦊"]
    for name in names:
        repository.delegate("targets", name, [f"{names.index(name)}/*"])
        repository.add(name, f"{names.index(name)}/file", name.encode())
    repository.release("targets", *names)

    assert client.download(*(f"{number}/file" for number in range(len(names)))) == 0
    assert sorted(client.has) == sorted(name.encode() for name in names)
    assert len(list(client.metadata.glob("*.json"))) == 4 + len(names)
    assert not (client.metadata.parent / "escape.json").exists()
    assert client.refresh() == 0


# ---------------------------------------------------------------- root (§5.3)
def test_a_chain_of_roots_is_walked_one_by_one_and_only_the_last_must_be_fresh(
    client: Client, repository: Repository
) -> None:
    repository.root.expires = in_days(-1)
    repository.rotate("root")
    repository.rotate("root", "timestamp", "snapshot", "targets")
    repository.root.expires = in_days(30)
    repository.put_root()
    repository.release("targets")

    assert client.refresh() == 0
    assert client.trusted == (4, 2, 2, 2)


def signed_by_new_keys_only(repository: Repository) -> None:
    before = repository.signers["root"][0]
    repository.root.revoke_key(before.public_key.keyid, "root")
    repository.signers["root"] = [CryptoSigner.generate_ed25519()]
    repository.root.add_key(repository.signers["root"][0].public_key, "root")
    repository.put_root()


def signed_by_old_keys_only(repository: Repository) -> None:
    old = list(repository.signers["root"])
    new = CryptoSigner.generate_ed25519()
    repository.root.revoke_key(old[0].public_key.keyid, "root")
    repository.root.add_key(new.public_key, "root")
    repository.put_root(signers=old)


def version_skipped(repository: Repository) -> None:
    repository.root.version += 1
    repository.put_root()
    repository.metadata["2.root.json"] = repository.metadata["3.root.json"]


def same_version_again(repository: Repository) -> None:
    repository.metadata["2.root.json"] = repository.metadata["1.root.json"]


def another_roles_file(repository: Repository) -> None:
    repository.metadata["2.root.json"] = repository.metadata["timestamp.json"]


def endless_root(repository: Repository) -> None:
    repository.root.unrecognized_fields["x"] = "x" * 600_000
    repository.put_root()


def final_root_expired(repository: Repository) -> None:
    repository.root.expires = in_days(-1)
    repository.put_root()


def threshold_of_two_met_by_one_key_twice(repository: Repository) -> None:
    """The same key under two ids would count twice, were keys told apart by their ids alone."""
    repository.root.roles["root"].threshold = 2
    repository.root.add_key(CryptoSigner.generate_ed25519().public_key, "root")
    repository.put_root(signers=repository.signers["root"] * 2)


BAD_ROOTS: list[tuple[Callable[[Repository], None], int]] = [
    (signed_by_new_keys_only, 1),
    (signed_by_old_keys_only, 1),
    (version_skipped, 1),
    (same_version_again, 1),
    (another_roles_file, 1),
    (endless_root, 1),
    (threshold_of_two_met_by_one_key_twice, 1),
    (final_root_expired, 2),  # it is trusted, and says that nothing else is
]


@pytest.mark.parametrize(("spoil", "trusted"), BAD_ROOTS, ids=[spoil.__name__ for spoil, _ in BAD_ROOTS])
def test_a_bad_root_stops_the_update(
    client: Client, repository: Repository, spoil: Callable[[Repository], None], trusted: int
) -> None:
    spoil(repository)
    repository.release("targets")

    assert client.refresh() == 1
    assert client.trusted == (trusted, 1, 1, 1)


# ---------------------------------------------------------------- timestamp, snapshot, targets (§5.4–5.6)
@dataclass(frozen=True)
class Fault:
    """What the repository does wrong after version 2, and which versions are trusted afterwards."""

    name: str
    spoil: Callable[[Repository], None]
    trusted: tuple[int, int, int, int]
    hashes: bool = False


def older_timestamp(repository: Repository) -> None:
    repository.put_timestamp(bump=-1)


def older_snapshot(repository: Repository) -> None:
    repository.put_snapshot(bump=-1)
    repository.put_timestamp()


def older_targets(repository: Repository) -> None:
    repository.put_targets("targets", bump=-1)
    repository.put_snapshot()
    repository.put_timestamp()


def snapshot_not_the_one_announced(repository: Repository) -> None:
    repository.put_snapshot()
    repository.put_timestamp()
    repository.metadata["3.snapshot.json"] = repository.metadata["2.snapshot.json"]


def targets_not_the_ones_announced(repository: Repository) -> None:
    repository.release("targets")
    repository.metadata["3.targets.json"] = repository.metadata["2.targets.json"]


def snapshot_changed_under_its_hash(repository: Repository) -> None:
    repository.put_snapshot()
    repository.put_timestamp()
    repository.snapshot.unrecognized_fields["x"] = 1
    announced = repository.timestamp.snapshot_meta
    repository.put_snapshot(bump=0)
    repository.timestamp.snapshot_meta = announced


def targets_changed_under_their_hash(repository: Repository) -> None:
    repository.release("targets")
    repository.targets.unrecognized_fields["x"] = 1
    repository.put_targets("targets", bump=0)


def snapshot_longer_than_announced(repository: Repository) -> None:
    repository.put_snapshot()
    repository.timestamp.snapshot_meta.length = 100
    repository.put_timestamp()


def role_removed_from_the_snapshot(repository: Repository) -> None:
    del repository.snapshot.meta["extra.json"]
    repository.put_snapshot()
    repository.put_timestamp()


def expired(role: str) -> Callable[[Repository], None]:
    def spoil(repository: Repository) -> None:
        getattr(repository, role).expires = in_days(-1)
        repository.release("targets")

    return spoil


def unsigned(role: str) -> Callable[[Repository], None]:
    def spoil(repository: Repository) -> None:
        repository.signers[role] = []
        repository.release("targets")

    return spoil


def stranger(role: str) -> Callable[[Repository], None]:
    def spoil(repository: Repository) -> None:
        repository.signers[role] = [CryptoSigner.generate_ed25519()]
        repository.release("targets")

    return spoil


def missing(name: str) -> Callable[[Repository], None]:
    def spoil(repository: Repository) -> None:
        repository.release("targets")
        del repository.metadata[name]

    return spoil


def endless_timestamp(repository: Repository) -> None:
    repository.timestamp.unrecognized_fields["x"] = "x" * 20_000
    repository.release("targets")


FAULTS = [
    Fault("timestamp rolled back", older_timestamp, (1, 2, 2, 2)),
    Fault("snapshot rolled back", older_snapshot, (1, 2, 2, 2)),
    Fault("snapshot rolled back, with hashes", older_snapshot, (1, 2, 2, 2), hashes=True),
    Fault("targets rolled back", older_targets, (1, 3, 2, 2)),
    Fault("targets rolled back, with hashes", older_targets, (1, 3, 2, 2), hashes=True),
    Fault("mix and match: snapshot", snapshot_not_the_one_announced, (1, 3, 2, 2)),
    Fault("mix and match: targets", targets_not_the_ones_announced, (1, 3, 3, 2)),
    Fault("snapshot with another hash", snapshot_changed_under_its_hash, (1, 3, 2, 2), hashes=True),
    Fault("targets with another hash", targets_changed_under_their_hash, (1, 3, 3, 2), hashes=True),
    Fault("snapshot too long", snapshot_longer_than_announced, (1, 3, 2, 2)),
    Fault("a role vanished", role_removed_from_the_snapshot, (1, 3, 2, 2)),
    Fault("timestamp too long", endless_timestamp, (1, 2, 2, 2)),
    Fault("timestamp expired", expired("timestamp"), (1, 2, 2, 2)),
    Fault("snapshot expired", expired("snapshot"), (1, 3, 2, 2)),
    Fault("targets expired", expired("targets"), (1, 3, 3, 2)),
    Fault("timestamp unsigned", unsigned("timestamp"), (1, 2, 2, 2)),
    Fault("snapshot unsigned", unsigned("snapshot"), (1, 3, 2, 2)),
    Fault("targets unsigned", unsigned("targets"), (1, 3, 3, 2)),
    Fault("timestamp signed by a stranger", stranger("timestamp"), (1, 2, 2, 2)),
    Fault("snapshot signed by a stranger", stranger("snapshot"), (1, 3, 2, 2)),
    Fault("targets signed by a stranger", stranger("targets"), (1, 3, 3, 2)),
    Fault("timestamp missing", missing("timestamp.json"), (1, 2, 2, 2)),
    Fault("snapshot missing", missing("3.snapshot.json"), (1, 3, 2, 2)),
    Fault("targets missing", missing("3.targets.json"), (1, 3, 3, 2)),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_stops_the_update_where_it_is(server: HttpRepository, tmp_path: Path, fault: Fault) -> None:
    """The steps before it are kept (§5.4–5.6), the ones after it are as they were."""
    repository = Repository(hashes=fault.hashes)
    repository.delegate("targets", "extra")
    repository.release("targets", "extra")
    client = start(server, tmp_path, repository)
    assert client.refresh() == 0
    assert client.trusted == (1, 2, 2, 2)

    fault.spoil(repository)

    assert client.refresh() == 1
    assert client.trusted == fault.trusted
    assert client.refresh() == 1


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_a_repository_that_stands_still_is_noticed_when_its_time_is_over(
    client: Client, repository: Repository, role: str
) -> None:
    """Freeze: the same genuine files for ever."""
    for one in (repository.root, repository.timestamp, repository.snapshot, repository.targets):
        one.expires = in_days(300)
    getattr(repository, role).expires = in_days(10)
    repository.put_root()
    repository.release("targets")

    assert client.refresh(days=9) == 0
    assert client.refresh(days=11) == 1
    assert client.refresh(days=9) == 0


@pytest.mark.parametrize(
    ("rotated", "role"),
    [(("timestamp",), "timestamp"), (("snapshot", "timestamp"), "snapshot"), (("snapshot",), "targets")],
)
def test_versions_that_a_thief_ran_up_begin_anew_after_new_keys(
    client: Client, repository: Repository, rotated: tuple[str, ...], role: str
) -> None:
    """Fast-forward recovery (§5.3.11)."""
    one = getattr(repository, role)
    one.version = 10_000
    if role == "targets":
        repository.put_targets("targets")
    if role != "timestamp":
        repository.put_snapshot()
    repository.put_timestamp()
    assert client.refresh() == 0
    assert client.trusts(role) == 10_001
    repository.rotate(*rotated)
    one.version = 1
    repository.release("targets")

    assert client.refresh() == 0
    assert client.trusts(role) == 2


def test_signatures_of_one_key_count_once(client: Client, repository: Repository) -> None:
    repository.root.roles["timestamp"].threshold = 2
    repository.root.add_key(CryptoSigner.generate_ed25519().public_key, "timestamp")
    repository.signers["timestamp"] *= 2
    repository.put_root()
    repository.release()

    assert client.refresh() == 1
    assert client.trusted == (2, 1, 1, 1)


def test_a_repeated_signature_in_the_file_counts_once_or_not_at_all(client: Client, repository: Repository) -> None:
    repository.root.roles["timestamp"].threshold = 2
    repository.root.add_key(CryptoSigner.generate_ed25519().public_key, "timestamp")
    repository.put_root()
    repository.release()
    said = json.loads(repository.metadata["timestamp.json"])
    said["signatures"] *= 2
    repository.metadata["timestamp.json"] = json.dumps(said).encode()

    assert client.refresh() == 1


# ---------------------------------------------------------------- targets and their bytes (§5.7)
def longer(repository: Repository, path: str) -> None:
    repository.files[path] += b"more"


def shorter(repository: Repository, path: str) -> None:
    repository.files[path] = repository.files[path][:-1]


def changed(repository: Repository, path: str) -> None:
    repository.files[path] = b"X" + repository.files[path][1:]


def gone(repository: Repository, path: str) -> None:
    del repository.files[path]


@pytest.mark.parametrize("spoil", [longer, shorter, changed, gone], ids=lambda spoil: spoil.__name__)
def test_bytes_that_are_not_the_signed_ones_are_not_kept(
    client: Client, repository: Repository, spoil: Callable[[Repository, str], None]
) -> None:
    repository.add("targets", "file", b"genuine")
    repository.add("targets", "next", b"next")
    repository.release("targets")
    spoil(repository, next(path for path in repository.files if path.endswith(".file")))

    assert client.download("file", "next") == 1
    assert client.has == []


def test_what_nobody_names_is_not_fetched(client: Client) -> None:
    assert client.download("nothing/of/that") == 1
    assert client.has == []


# ---------------------------------------------------------------- delegations (§5.6.7)
def roles_asked(repository: Repository) -> list[str]:
    """Return the delegated roles in the order they were asked for."""
    plain = [name.partition(".")[2].removesuffix(".json") for name in repository.asked]
    return [name for name in plain if name in repository.delegated]


@dataclass(frozen=True)
class Tree:
    """Delegations (parent, role, paths, terminating), and the order in which roles are visited for ``a/file``."""

    name: str
    edges: tuple[tuple[str, str, str, bool], ...]
    visited: list[str]


def to(parent: str, role: str, paths: str = "*/*", *, ends: bool = False) -> tuple[str, str, str, bool]:
    return (parent, role, paths, ends)


TOP = "targets"
MANY = [f"r{number:02}" for number in range(40)]
TREES = [
    Tree("depth first", (to(TOP, "A"), to(TOP, "B"), to("A", "C")), ["A", "C", "B"]),
    Tree("paths that do not match", (to(TOP, "A", "b/*"), to(TOP, "B", "a/*")), ["B"]),
    Tree("a star is one segment", (to(TOP, "A", "*"), to(TOP, "B", "a/?ile")), ["B"]),
    Tree("a cycle", (to(TOP, "A"), to("A", "B"), to("B", "A")), ["A", "B"]),
    Tree("a role of its own", (to(TOP, "A"), to("A", "A")), ["A"]),
    Tree("terminating", (to(TOP, "A", ends=True), to(TOP, "B"), to("A", "C")), ["A", "C"]),
    Tree("terminating further down", (to(TOP, "A"), to(TOP, "B"), to("A", "C", ends=True)), ["A", "C"]),
    Tree("a chain narrows", (to(TOP, "A"), to("A", "B", "b/*")), ["A"]),
    Tree("at most 32", tuple(to(TOP, name) for name in MANY), MANY[:32]),
]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name)
def test_roles_are_visited_in_order_of_trust(client: Client, repository: Repository, tree: Tree) -> None:
    signers: dict[str, CryptoSigner] = {}
    for parent, name, paths, terminating in tree.edges:
        signers[name] = repository.delegate(parent, name, [paths], terminating=terminating, signer=signers.get(name))
    for name, signer in signers.items():
        repository.signers[name] = [signer]
    repository.release("targets", *signers)

    assert client.download("a/file") == 1
    assert roles_asked(repository) == tree.visited


def test_the_first_role_that_names_a_target_has_the_word(client: Client, repository: Repository) -> None:
    for name in ("A", "B"):
        repository.delegate("targets", name)
        repository.add(name, "file", name.encode())
    repository.release("targets", "A", "B")

    assert client.download("file") == 0
    assert (client.has, roles_asked(repository)) == ([b"A"], ["A"])


def test_a_role_speaks_only_for_paths_delegated_to_it(client: Client, repository: Repository) -> None:
    repository.delegate("targets", "A", ["a/*"])
    repository.add("A", "b/file", b"evil")
    repository.release("targets", "A")

    assert client.download("b/file") == 1


def test_path_hash_prefixes_choose_a_role(client: Client, repository: Repository) -> None:
    digest = sha256(b"file").hexdigest()
    other = f"{(int(digest[0], 16) + 1) % 16:x}"
    repository.delegate("targets", "A", prefixes=[other])
    repository.delegate("targets", "B", prefixes=[digest[:3]])
    for name in ("A", "B"):
        repository.add(name, "file", name.encode())
    repository.release("targets", "A", "B")

    assert client.download("file") == 0
    assert (client.has, roles_asked(repository)) == ([b"B"], ["B"])


def test_succinct_bins_choose_a_role(client: Client, repository: Repository) -> None:
    names = repository.delegate_bins(4, "bin")
    chosen = names[int(sha256(b"file").hexdigest()[0], 16)]
    repository.add(chosen, "file", b"binned")
    repository.release("targets", *names)

    assert client.download("file") == 0
    assert roles_asked(repository) == [chosen]
    assert client.trusts(chosen) == 1


def test_a_role_that_the_snapshot_does_not_name_is_not_used(client: Client, repository: Repository) -> None:
    repository.delegate("targets", "A")
    repository.add("A", "file", b"A")
    repository.release("targets", "A")
    del repository.snapshot.meta["A.json"]
    repository.put_snapshot()
    repository.put_timestamp()

    assert client.download("file") == 1
    assert client.trusts("A") is None


@pytest.mark.parametrize("fault", ["unsigned", "expired", "rolled back", "missing"])
def test_a_delegated_role_is_held_to_the_same_rules(client: Client, repository: Repository, fault: str) -> None:
    repository.delegate("targets", "A")
    repository.add("A", "file", b"A")
    repository.release("targets", "A")
    if fault == "unsigned":
        repository.signers["A"] = []
    if fault == "expired":
        repository.role("A").expires = in_days(-1)
    repository.put_targets("A")
    repository.put_snapshot()
    repository.put_timestamp()
    if fault == "rolled back":
        repository.metadata["2.A.json"] = repository.metadata["1.A.json"]
    if fault == "missing":
        del repository.metadata["2.A.json"]

    assert client.download("file") == 1
    assert client.has == []


def test_a_role_with_two_delegators_is_verified_for_each_of_them(client: Client, repository: Repository) -> None:
    """A diamond: what A's branch vouches for is nothing to B's, in the same run."""
    for branch in ("A", "B"):
        repository.delegate("targets", branch, [f"{branch}/*"])
        signer = repository.delegate(branch, "shared", [f"{branch}/*"])
        repository.add("shared", f"{branch}/file", branch.encode())
    repository.signers["shared"].remove(signer)  # A's key only
    repository.release("targets", "A", "B", "shared")

    assert client.download("A/file", "B/file") == 1
    assert client.has == [b"A"]


def test_a_cached_role_is_not_used_for_a_delegator_that_does_not_vouch_for_it(
    client: Client, repository: Repository
) -> None:
    """The same over two runs: the file is on disk, genuine, and of the version that the snapshot names."""
    test_a_role_with_two_delegators_is_verified_for_each_of_them(client, repository)

    assert client.trusts("shared") == 1
    assert client.download("B/file") == 1
    assert client.download("A/file") == 0


def test_a_cached_role_whose_key_was_revoked_is_not_used(client: Client, repository: Repository) -> None:
    revoked = repository.delegate("targets", "A")
    repository.add("A", "file", b"A")
    repository.release("targets", "A")
    assert client.download("file") == 0
    repository.delegate("targets", "A")  # another key; role A is not signed anew
    assert repository.targets.delegations is not None
    del repository.targets.delegations.keys[revoked.public_key.keyid]
    repository.release("targets")

    assert client.download("file") == 1
    assert client.refresh() == 0
    assert client.trusts("A") is None


# ---------------------------------------------------------------- the executable itself
@pytest.mark.parametrize(("days", "code"), [(0, 0), (400, 1)], ids=["now", "in 400 days"])
def test_the_executable_does_the_same_as_a_process_of_its_own(
    server: HttpRepository, tmp_path: Path, repository: Repository, days: int, code: int
) -> None:
    client = start(server, tmp_path, repository)
    environment = {**os.environ, "PYTHONPATH": str(EXECUTABLE.parents[2])}

    ended = subprocess.run(
        [sys.executable, str(EXECUTABLE), *client.words("refresh", days=days)],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert ended.returncode == code, ended.stderr
    assert bool(ended.stderr) is bool(code)
    assert os.access(EXECUTABLE, os.X_OK)
