"""A change of the trust metadata: the next versions of some roles, who must sign them, and what they say.

Pure but for signing: takes verified metadata, edits copies of it one version up, and tells for each whose signatures
are there and whose are missing. Where it goes (server, file) is for the commands.

A change is whole: what a new root or new delegation would leave without enough valid signatures gets its next version
in the same change (`settle`).
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, TargetFile, Targets

from fleet_server.api_types import OnlineKeysView, Publication
from fleet_server.cli.errors import CannotSign, NotTrusted, TooFewSignatures
from fleet_server.cli.key_folder import IMAGE_TARGETS, TARGETS, KeyFolder, owner_of
from fleet_server.cli.signers import KeyHolder, Passphrase
from fleet_server.cli.signing import (
    MALFORMED,
    REPOSITORIES,
    ROOT_LIFE,
    TARGETS_LIFE,
    Verified,
    name_online_keys,
    read,
)
from protocol.names import FAMILY_NAME
from protocol.release import (
    EMPTY_SHA256,
    MAX_YANK_REASON,
    RESERVED_FAMILIES,
    YANKED,
    bundle_path,
    family_of_path,
    family_pattern,
    floor_path,
    from_custom,
    is_bundle_path,
    is_floor_path,
    model_of_floor,
    yanked_reason,
)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Signatures that one piece of metadata needs: of ``by``'s keys for ``role``."""

    title: str
    metadata: "Metadata[Root] | Metadata[Targets]"
    by: Root | Targets
    role: str

    def allowed(self) -> Sequence[Key]:
        """Return the keys that may sign."""
        ids = self.by.get_delegated_role(self.role).keyids
        return [self.by.get_key(keyid) for keyid in ids]

    def missing(self) -> str:
        """Return who must sign still, in words; empty when enough have."""
        result = self.by.get_verification_result(self.role, self.metadata.signed_bytes, self.metadata.signatures)
        if result.verified:
            return ""
        others = ", ".join(owner_of(key) for key in result.unsigned.values()) or "nobody: it names too few keys"
        return (
            f"{self.title}: {len(result.signed)} of {result.threshold} signatures; "
            f"{result.missing} more from: {others}"
        )


@dataclass(kw_only=True)
class Change:
    """The next versions of some roles, on top of what is in force."""

    base: Verified
    now: datetime
    roots: dict[str, Metadata[Root]] = field(default_factory=dict)  # ``image``, ``director``
    targets: dict[str, Metadata[Targets]] = field(default_factory=dict)  # ``targets`` and families

    # ------------------------------------------------------------ what is being edited
    def root(self, repository: str) -> Root:
        """Return the next root of a repository, for editing."""
        if repository not in self.roots:
            following = deepcopy(self.root_before(repository))
            following.version += 1
            following.expires = self.now + ROOT_LIFE
            self.roots[repository] = Metadata(following)
        return self.roots[repository].signed

    def role(self, role: str) -> Targets:
        """Return the next metadata of ``targets`` or a family, for editing."""
        if role not in self.targets:
            following = deepcopy(self.base.signed[role].signed)
            following.version += 1
            following.expires = self.now + TARGETS_LIFE
            self.targets[role] = Metadata(following)
        return self.targets[role].signed

    def root_before(self, repository: str) -> Root:
        """Return the root in force."""
        return self.base.root if repository == "image" else self.base.director_root

    def after(self) -> Verified:
        """Return what is in force when this change is."""
        roots = {repository: metadata.signed for repository, metadata in self.roots.items()}
        return Verified(
            root=roots.get("image", self.base.root),
            director_root=roots.get("director", self.base.director_root),
            signed={**self.base.signed, **self.targets},
        )

    # ------------------------------------------------------------ keys
    def renew(self, role: str) -> None:
        """Give a role its next version with a new expiry and nothing else changed."""
        if role in ROOT_OF:
            self.root(ROOT_OF[role])
        else:
            self.role(TARGETS if role == IMAGE_TARGETS else self._known_family(role))

    def add_keys(self, role: str, keys: Sequence[Key], threshold: int | None = None) -> None:
        """Let more keys sign for a role, and say how many must."""
        by, name = self._delegator(role)
        for key in keys:
            by.add_key(key, name)
        self._set_threshold(role, threshold)

    def revoke_key(self, role: str, who: str, threshold: int | None = None) -> None:
        """Let a key, by its owner or the beginning of its id, sign for a role no longer."""
        by, name = self._delegator(role)
        by.revoke_key(self.find_key(role, who).keyid, name)
        self._set_threshold(role, threshold)

    def find_key(self, role: str, who: str) -> Key:
        """Return the one key of a role that is called so; raise `CannotSign`."""
        keys = self.keys_of(role)
        found = [key for key in keys if who and (key.keyid.startswith(who) or owner_of(key).split(" (")[0] == who)]
        if len(found) != 1:
            known = ", ".join(owner_of(key) for key in keys)
            raise CannotSign(f"{role}: {who!r} names {len(found)} of its keys, not one; they are: {known}")
        return found[0]

    def keys_of(self, role: str) -> Sequence[Key]:
        """Return the keys that sign for a role."""
        by, name = self._delegator(role, edit=False)
        return [by.get_key(keyid) for keyid in by.get_delegated_role(name).keyids]

    def name_online_keys(self, online: OnlineKeysView) -> None:
        """Have both next roots name the online keys that the server shows."""
        for repository in REPOSITORIES:
            name_online_keys(self.root(repository), repository, online)

    def delegate(self, family: str, keys: Sequence[Key], threshold: int) -> None:
        """Give a family its own keys; what is published of it moves under them, unchanged."""
        if not FAMILY_NAME.fullmatch(family) or family in RESERVED_FAMILIES:
            raise CannotSign(f"{family[:80]!r} is no name for a family with keys of its own")
        if family in self.base.signed:
            raise CannotSign(f"{family} is delegated already; change its keys with: edgewarden keys add | revoke")
        top = self.role(TARGETS)
        moved = {path: target for path, target in top.targets.items() if family_of_path(path) == family}
        top.targets = {path: target for path, target in top.targets.items() if path not in moved}
        if top.delegations is None:
            top.delegations = Delegations({}, {})
        if top.delegations.roles is None:
            raise CannotSign("the targets delegate by hash, which this command does not know")
        top.delegations.roles[family] = DelegatedRole(family, [], 1, True, [family_pattern(family)])
        for key in keys:
            top.add_key(key, family)
        self.targets[family] = Metadata(Targets(version=1, expires=self.now + TARGETS_LIFE, targets=moved))
        self._set_threshold(family, threshold)

    def _set_threshold(self, role: str, threshold: int | None) -> None:
        by, name = self._delegator(role)
        delegation = by.get_delegated_role(name)
        if threshold is not None:
            delegation.threshold = threshold
        if not 1 <= delegation.threshold <= len(delegation.keyids):
            raise CannotSign(
                f"{role}: {len(delegation.keyids)} keys cannot give {delegation.threshold} signatures; "
                "say another number with --threshold"
            )

    def _delegator(self, role: str, *, edit: bool = True) -> tuple[Root | Targets, str]:
        """Return the metadata that names a role's keys, and the role's name there."""
        if role in ROOT_OF:
            repository = ROOT_OF[role]
            return (self.root(repository) if edit else self._root_after(repository)), Root.type
        if role == IMAGE_TARGETS:
            return (self.root("image") if edit else self.after().root), Targets.type
        family = self._known_family(role)
        return (self.role(TARGETS) if edit else self.after().targets), family

    def _root_after(self, repository: str) -> Root:
        return self.roots[repository].signed if repository in self.roots else self.root_before(repository)

    def _known_family(self, role: str) -> str:
        known = [*ROOT_OF, IMAGE_TARGETS, *sorted(set(self.after().signed) - {TARGETS})]
        if role not in known or role == TARGETS:
            raise CannotSign(f"there is no role {role[:80]!r}; the roles are {', '.join(known)}")
        return role

    # ------------------------------------------------------------ targets
    def add_bundles(self, family: str, added: Mapping[str, TargetFile]) -> None:
        """Name new bundles of a family."""
        self.role(self.base.role_of(family)).targets.update(added)

    def yank(self, model: str, version: int, reason: str, variant: str | None = None) -> Sequence[str]:
        """Mark a version so that it is not newly installed; return the paths."""
        if not 0 < len(reason) <= MAX_YANK_REASON or not reason.isprintable():
            raise CannotSign(f"a reason has 1 to {MAX_YANK_REASON} printable characters")
        found = []
        for role, path, target in self._bundles_of(model):
            release = from_custom(target.custom["release"])
            if release.version == version and variant in (None, release.variant):
                found.append(path)
                if yanked_reason(target.custom) is None:
                    self.role(role).targets[path].unrecognized_fields["custom"][YANKED] = reason
        if not found:
            what = f"{model} {version}" + (f" ({variant})" if variant else "")
            raise CannotSign(f"{what} is not published; see: edgewarden models list")
        if not self.targets:
            raise CannotSign(f"{model} {version} is yanked already")
        return found

    def raise_floor(self, model: str, floor: int) -> None:
        """Say the lowest version of a model that devices may run."""
        bundles = list(self._bundles_of(model))
        versions = [from_custom(target.custom["release"]).version for _, _, target in bundles]
        if not bundles:
            raise CannotSign(f"no version of {model} is published; see: edgewarden models list")
        if floor > max(versions):
            raise CannotSign(f"floor {floor} is above {max(versions)}, the highest published version of {model}")
        role, first, _ = bundles[0]
        path = floor_path(family_of_path(first), model)
        current = self.base.signed[role].signed.targets.get(path)
        if current is not None and floor <= current.custom["floor"]:
            raise CannotSign(f"the floor of {model} is {current.custom['floor']} already; it only grows")
        custom = {"custom": {"floor": floor}}
        self.role(role).targets[path] = TargetFile(0, {"sha256": EMPTY_SHA256}, path, custom)

    def _bundles_of(self, model: str) -> Iterator[tuple[str, str, TargetFile]]:
        for role, metadata in self.base.signed.items():
            for path, target in sorted(metadata.signed.targets.items()):
                if is_bundle_path(path) and from_custom(target.custom["release"]).model == model:
                    yield role, path, target

    # ------------------------------------------------------------ signatures
    def settle(self) -> None:
        """Give its next version to everything that would be left with too few valid signatures."""
        if not _holds(self.after().root, TARGETS, self.after().signed[TARGETS]):
            self.role(TARGETS)
        for family in sorted(set(self.after().signed) - {TARGETS}):
            if not _holds(self.after().targets, family, self.after().signed[family]):
                self.role(family)

    def demands(self) -> Sequence[Demand]:
        """Return every set of signatures that is needed."""
        found = []
        for repository, metadata in self.roots.items():
            root, title = metadata.signed, f"{REPOSITORIES[repository]} {metadata.signed.version}"
            before = self.root_before(repository)
            as_before = f"{title} (as {before.version} demands)"
            found.append(Demand(title=as_before, metadata=metadata, by=before, role=Root.type))
            found.append(Demand(title=title, metadata=metadata, by=root, role=Root.type))
        after = self.after()
        for role, signed in self.targets.items():
            by: Root | Targets = after.root if role == TARGETS else after.targets
            title = f"{IMAGE_TARGETS if role == TARGETS else role} {signed.signed.version}"
            found.append(Demand(title=title, metadata=signed, by=by, role=role))
        return found

    def sign(self, folder: KeyFolder, passphrase: Passphrase) -> Sequence[str]:
        """Sign with every key of the folder that may; return what was signed, by whom."""
        opened: dict[str, KeyHolder] = {}
        said: list[str] = []
        for demand in self.demands():
            wanted = {key.keyid: key for key in demand.allowed()}
            for holder in self._holders(folder, set(wanted), passphrase, opened):
                if holder.public.keyid not in demand.metadata.signatures:
                    signature = holder.sign(demand.metadata.signed_bytes)
                    demand.metadata.signatures[signature.keyid] = signature
                    said.append(f"{demand.title} by {owner_of(wanted[signature.keyid])}")
        return said

    def _holders(
        self, folder: KeyFolder, wanted: set[str], passphrase: Passphrase, opened: dict[str, KeyHolder]
    ) -> Iterator[KeyHolder]:
        for held in folder.held():
            if held.public is None or held.public.keyid in wanted:
                if held.name not in opened:
                    opened[held.name] = folder.open(held, passphrase)
                if opened[held.name].public.keyid in wanted:
                    yield opened[held.name]

    def missing(self) -> Sequence[str]:
        """Return who must sign still, a line for each piece of metadata."""
        return [line for line in (demand.missing() for demand in self.demands()) if line]

    def publication(self) -> Publication:
        """Return what the server takes, with the signatures there are."""
        targets = {role: metadata.to_bytes() for role, metadata in self.targets.items()}
        roots = {repository: metadata.to_bytes() for repository, metadata in self.roots.items()}
        return Publication(
            targets=targets.pop(TARGETS, None),
            delegated=targets,
            image_root=roots.get("image"),
            director_root=roots.get("director"),
        )

    def complete(self) -> Publication:
        """Return what the server takes; raise `TooFewSignatures`, which says who is missing."""
        missing = self.missing()
        if missing:
            raise TooFewSignatures("too few signatures\n" + "\n".join(f"  {line}" for line in missing))
        return self.publication()


ROOT_OF = {name: repository for repository, name in REPOSITORIES.items()}


def change_of(base: Verified, publication: Publication, now: datetime) -> Change:
    """Return the change that a file brings; raise `NotTrusted` unless each part is the next version of its role."""
    change = Change(base=base, now=now)
    for repository, data in (("image", publication.image_root), ("director", publication.director_root)):
        if data is not None:
            change.roots[repository] = read(Root, data, f"the file's {REPOSITORIES[repository]}")
    targets = {TARGETS: publication.targets} if publication.targets is not None else {}
    for role, data in {**targets, **publication.delegated}.items():
        change.targets[role] = read(Targets, data, f"the file's {role}")
    _check_numbers(change)
    return change


def _check_numbers(change: Change) -> None:
    after = change.after()
    expected = {
        REPOSITORIES[r]: (change.root_before(r).version + 1, m.signed.version) for r, m in change.roots.items()
    }
    for role, metadata in change.targets.items():
        before = change.base.signed.get(role)
        expected[role] = (before.signed.version + 1 if before else 1, metadata.signed.version)
    for role, (wanted, found) in expected.items():
        if wanted != found:
            raise NotTrusted(
                f"{role}: the file has version {found}, {wanted} is next; it was made before someone else's change "
                "and must be made anew"
            )
    delegated = after.targets.delegations.roles if after.targets.delegations else None
    unknown = set(change.targets) - {TARGETS} - set(delegated or {})
    if unknown:
        raise NotTrusted(f"the file signs for {', '.join(sorted(unknown))}, which nobody delegated")


def _holds(by: Root | Targets, role: str, metadata: Metadata[Targets]) -> bool:
    try:
        by.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except MALFORMED:
        return False
    return True


# ---------------------------------------------------------------- in words
def describe(change: Change) -> Sequence[str]:
    """Return what a change says, a line for each thing, compared with what is in force."""
    lines: list[str] = []
    for repository, metadata in change.roots.items():
        before = change.base.root if repository == "image" else change.base.director_root
        lines.append(_headline(REPOSITORIES[repository], metadata.signed))
        for role in sorted(metadata.signed.roles):
            lines += _key_changes(_called(repository, role), before, metadata.signed, role)
    for role, signed in change.targets.items():
        old = change.base.signed.get(role)
        lines.append(_headline(IMAGE_TARGETS if role == TARGETS else role, signed.signed))
        lines += _delegation_changes(old.signed if old else None, signed.signed)
        lines += _target_changes(old.signed.targets if old else {}, signed.signed.targets, change)
    return lines


def _headline(name: str, signed: Root | Targets) -> str:
    return f"{name} {signed.version}, until {signed.expires.date().isoformat()}"


def _called(repository: str, role: str) -> str:
    return f"{repository}-{role}"


def _key_changes(name: str, before: Root | Targets | None, after: Root | Targets, role: str) -> Sequence[str]:
    old = _keys(before, role)
    new = _keys(after, role)
    lines = [f"  {name}: new key {owner_of(key)}" for keyid, key in new.items() if keyid not in old]
    lines += [f"  {name}: key {owner_of(key)} no longer counts" for keyid, key in old.items() if keyid not in new]
    now, then = after.get_delegated_role(role).threshold, _threshold(before, role)
    return lines if now == then else [*lines, f"  {name}: {now} of {len(new)} must sign"]


def _keys(by: Root | Targets | None, role: str) -> Mapping[str, Key]:
    try:
        return {k: by.get_key(k) for k in by.get_delegated_role(role).keyids} if by else {}
    except ValueError:
        return {}


def _threshold(by: Root | Targets | None, role: str) -> int | None:
    try:
        return by.get_delegated_role(role).threshold if by else None
    except ValueError:
        return None


def _delegation_changes(before: Targets | None, after: Targets) -> Sequence[str]:
    roles = after.delegations.roles if after.delegations else None
    lines: list[str] = []
    for family, role in sorted((roles or {}).items()):
        if _threshold(before, family) is None:
            lines.append(f"  delegates {family}: {', '.join(role.paths or [])}")
        lines += _key_changes(f"family {family}", before, after, family)
    return lines


def _target_changes(
    before: Mapping[str, TargetFile], after: Mapping[str, TargetFile], change: Change
) -> Sequence[str]:
    elsewhere = {path for m in change.after().signed.values() for path in m.signed.targets}
    known = {path: target for m in change.base.signed.values() for path, target in m.signed.targets.items()}
    lines = []
    for path, target in sorted(after.items()):
        if path not in before and known.get(path) == target:
            lines.append(f"  {path}: moves here")
        elif before.get(path) != target:
            lines.append(f"  {path}: {_target_in_words(path, target)}")
    return lines + [
        f"  {path}: {'moves away' if path in elsewhere else 'GONE'}" for path in before if path not in after
    ]


def _target_in_words(path: str, target: TargetFile) -> str:
    if is_floor_path(path):
        return f"floor of {model_of_floor(path)} becomes {target.custom.get('floor')}"
    release = from_custom(target.custom["release"])
    what = f"{release.model} {release.version} ({release.variant})"
    if reason := yanked_reason(target.custom):
        return f"{what} is yanked: {reason}"
    mismatch = "" if bundle_path(release) == path else ", UNDER THE PATH OF ANOTHER"
    return f"{what}, {target.length} bytes, sha256 {target.hashes.get('sha256')}{mismatch}"
