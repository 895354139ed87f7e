"""After enrolment: renewals that may be cut short, revocation, ids opened again, and a CA that is replaced."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from trust_world import DAY, World, make_csr, now_ms

from fleet_server.adapters.authority import CertificateAuthority, RotationRefused, facts_of
from fleet_server.api_types import TokenRequest
from fleet_server.enrolment import BadRequest, DeviceExists, TokenRefused
from fleet_server.membership import UnknownDevice
from fleet_server.ports import Device
from protocol.device_api import EnrolRequest, EnrolResponse, RenewRequest, parse_token

HOUR = 3600 * 1000


def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def known(world: World, device: str = "cam-1") -> Device:
    found = world.registry.device(device)
    assert found is not None
    return found


def enrol(
    world: World, device: str = "cam-1", *, token: str = "", own: object = None, ahead: int = 0
) -> EnrolResponse:
    text = token or world.enrolment.create_token(TokenRequest(labels={"site": "oslo"}), now_ms()).token
    parsed = parse_token(text)
    csr = make_csr(device, key=own)
    request = EnrolRequest(token_id=parsed.id, secret=parsed.secret, device=device, csr=csr)
    return world.enrolment.enrol(request, now_ms() + ahead)


def renew(world: World, own: object = None, device: str = "cam-1") -> str:
    return world.membership.renew(device, RenewRequest(csr=make_csr(device, key=own)), now_ms()).certificate


# ---------------------------------------------------------------- renewal
def test_the_certificate_in_force_stays_until_the_next_one_is_used(ready: World) -> None:
    first = enrol(ready).certificate
    second = renew(ready)
    assert (known(ready).certificate, known(ready).next_certificate) == (first, second)
    ready.membership.has_used_next(known(ready), now_ms())
    assert (known(ready).certificate, known(ready).next_certificate) == (second, "")
    assert ready.membership.retired(now_ms()) == [first]


def test_a_renewal_whose_answer_was_lost_is_asked_for_again_with_the_same_key(ready: World) -> None:
    first, own = enrol(ready).certificate, key()
    lost, heard = renew(ready, own), renew(ready, own)
    assert facts_of(lost).key_sha256 == facts_of(heard).key_sha256
    ready.membership.has_used_next(known(ready), now_ms())
    assert known(ready).certificate == heard
    assert sorted(ready.membership.retired(now_ms())) == sorted([lost, first])


def test_a_renewal_is_for_a_fresh_key(ready: World) -> None:
    own = key()
    enrol(ready, own=own)
    with pytest.raises(BadRequest, match="fresh key"):
        renew(ready, own)


def test_a_renewal_in_another_name_or_of_nobody_is_refused(ready: World) -> None:
    enrol(ready)
    with pytest.raises(BadRequest, match="common name"):
        ready.membership.renew("cam-1", RenewRequest(csr=make_csr("cam-2")), now_ms())
    with pytest.raises(UnknownDevice):
        renew(ready, device="cam-9")


def test_what_has_expired_is_forgotten(ready: World) -> None:
    enrol(ready)
    ready.membership.revoke("cam-1", "admin", now_ms())
    assert len(ready.membership.retired(now_ms())) == 1
    assert ready.membership.retired(now_ms() + 366 * DAY) == []
    assert ready.registry.retired() == []


# ---------------------------------------------------------------- revocation
def test_a_revoked_device_is_blocked_before_the_broker_is_asked(ready: World) -> None:
    enrol(ready)
    renew(ready)
    ready.uplink.reachable = False
    assert ready.membership.revoke("cam-1", "admin", now_ms()) is False
    assert known(ready).revoked
    assert ready.uplink.expelled == ["cam-1"]
    assert len(ready.membership.retired(now_ms())) == 2
    ready.uplink.reachable = True
    assert ready.membership.revoke("cam-1", "admin", now_ms()) is True  # again does no harm
    assert len(ready.membership.retired(now_ms())) == 2


def test_nobody_can_be_revoked_or_opened_who_is_not_there(ready: World) -> None:
    with pytest.raises(UnknownDevice, match="cam-9"):
        ready.membership.revoke("cam-9", "admin", now_ms())
    with pytest.raises(UnknownDevice, match="needs no opening"):
        ready.membership.reopen("cam-9", 60, "admin", now_ms())


# ---------------------------------------------------------------- enrolment again
def opened(world: World, *, ahead: int = 0) -> None:
    enrol(world)
    world.membership.reopen("cam-1", 3600, "admin", now_ms() + ahead)


CLOSED: list[tuple[str, Callable[[World], object]]] = [
    ("never opened", enrol),
    ("an opening that is over", lambda w: opened(w, ahead=-2 * HOUR)),
    ("an opening that was used", lambda w: (opened(w), enrol(w))),
    ("revoked, and never opened", lambda w: (enrol(w), w.membership.revoke("cam-1", "admin", now_ms()))),
    ("opened, then revoked", lambda w: (opened(w), w.membership.revoke("cam-1", "admin", now_ms()))),
]


@pytest.mark.parametrize("before", [c[1] for c in CLOSED], ids=[c[0] for c in CLOSED])
def test_an_id_that_exists_does_not_enrol_again(ready: World, before: Callable[[World], object]) -> None:
    before(ready)
    certificate = known(ready).certificate
    with pytest.raises(DeviceExists, match="edgewarden devices reopen cam-1"):
        enrol(ready)
    assert known(ready).certificate == certificate


@pytest.mark.parametrize("revoked", [False, True])
def test_an_opened_id_enrols_once_with_a_new_key_and_the_old_certificate_counts_no_more(
    ready: World, revoked: bool
) -> None:
    old = enrol(ready).certificate
    wanted = ready.desired.current["cam-1"]
    if revoked:
        ready.membership.revoke("cam-1", "admin", now_ms())
    ready.membership.reopen("cam-1", 3600, "admin", now_ms())
    new = enrol(ready).certificate
    device = known(ready)
    assert (device.certificate, device.revoked, device.open_until, device.labels) == (new, False, 0, {"site": "oslo"})
    assert ready.membership.retired(now_ms()) == [old]
    assert (ready.uplink.expelled[-1:], ready.uplink.admitted[-1:], ready.replaced) == (["cam-1"], ["cam-1"], [True])
    now = ready.desired.current["cam-1"]
    assert (now.version, now.assigned) == (wanted.version + 1, wanted.assigned)


def test_an_opening_is_not_for_the_key_that_was_lost(ready: World) -> None:
    own = key()
    enrol(ready, own=own)
    ready.membership.reopen("cam-1", 3600, "admin", now_ms())
    with pytest.raises(BadRequest, match="opened for a new key"):
        enrol(ready, own=own)


def test_an_opening_does_not_replace_a_token(ready: World) -> None:
    opened(ready)
    text = ready.enrolment.create_token(TokenRequest(life_seconds=1), now_ms()).token
    with pytest.raises(TokenRefused):
        enrol(ready, token=text, ahead=HOUR // 2)


@pytest.mark.parametrize("seconds", [0, -1, 31 * 24 * 3600])
def test_an_opening_has_a_bounded_life(ready: World, seconds: int) -> None:
    enrol(ready)
    with pytest.raises(BadRequest, match="seconds"):
        ready.membership.reopen("cam-1", seconds, "admin", now_ms())


def test_an_enrolment_whose_answer_was_lost_is_answered_again_at_no_cost(ready: World) -> None:
    """Same id, same key, same token, whose only use is spent: it is the same device."""
    own, text = key(), ready.enrolment.create_token(TokenRequest(), now_ms()).token
    lost = enrol(ready, token=text, own=own)
    assert enrol(ready, token=text, own=own) == lost
    with pytest.raises(DeviceExists):
        enrol(ready, token=text)  # another key
    with pytest.raises(TokenRefused):
        enrol(ready, token=text, own=own, ahead=2 * HOUR)
    with pytest.raises(TokenRefused):
        enrol(ready, "cam-2", token=text)


@pytest.mark.parametrize("device", ["server", "srv", "admin"])
def test_the_names_of_the_server_are_not_for_devices(ready: World, device: str) -> None:
    with pytest.raises(BadRequest, match="reserved"):
        enrol(ready, device)


def test_a_server_restored_from_an_old_backup_takes_an_unknown_device_as_a_new_one(ready: World) -> None:
    enrol(ready)
    del ready.registry.known["cam-1"]  # what the backup does not know
    del ready.desired.current["cam-1"]
    with pytest.raises(UnknownDevice):
        ready.membership.standing("cam-1")
    enrol(ready)
    assert ready.membership.standing("cam-1").expires == facts_of(known(ready).certificate).expires_at


# ---------------------------------------------------------------- a CA that is replaced
def test_while_a_next_ca_is_there_it_signs_and_both_are_told(ready: World) -> None:
    before = ready.authority.ca_key_sha256()
    old = enrol(ready).certificate
    following = ready.authority.make_next_ca(now_ms())
    ready.restart()
    answer = enrol(ready, "cam-2")
    assert (facts_of(answer.certificate).ca, answer.ca.count("BEGIN CERT")) == (following, 2)
    assert ready.authority.ca_key_sha256() == before  # what the server shows, and tokens pin
    assert [facts_of(old).ca, following] == ready.authority.ca_ids()
    assert ready.authority.server_files().ca.read_text() == answer.ca
    shown = x509.load_pem_x509_certificate(ready.authority.server_files().certificate.read_bytes())
    shown.verify_directly_issued_by(x509.load_pem_x509_certificate(answer.ca.encode()))


def test_retiring_leaves_the_next_ca_alone_and_destroys_the_old_key(ready: World) -> None:
    folder = ready.folder / "authority"
    old_key, old_pin = (folder / "device-ca.key").read_bytes(), ready.authority.ca_key_sha256()
    following = ready.authority.make_next_ca(now_ms())
    ready.authority.retire_ca()
    ready.restart()
    assert ready.authority.ca_ids() == [following]
    assert ready.authority.ca_key_sha256() != old_pin
    assert not any(path.read_bytes() == old_key for path in folder.iterdir())
    shown = x509.load_pem_x509_certificate(ready.authority.server_files().certificate.read_bytes())
    shown.verify_directly_issued_by(x509.load_pem_x509_certificate(ready.authority.ca_certificate()))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_retirement_that_was_cut_short_is_finished_at_the_next_start(
    ready: World, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = ready.authority.make_next_ca(now_ms())
    replace, left = Path.replace, iter(range(step))

    def cut(self: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise OSError("power cut")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(OSError, match="power cut"):
        ready.authority.retire_ca()
    monkeypatch.undo()
    ready.restart()
    assert ready.authority.ca_ids() == [following]


def test_steps_out_of_order_are_refused(ready: World) -> None:
    with pytest.raises(RotationRefused, match="no next CA"):
        ready.authority.retire_ca()
    ready.authority.make_next_ca(now_ms())
    with pytest.raises(RotationRefused, match="is there already"):
        ready.authority.make_next_ca(now_ms())


def test_the_revocation_list_has_what_each_ca_issued_and_does_not_expire_soon(ready: World) -> None:
    first = enrol(ready).certificate
    ready.authority.make_next_ca(now_ms())
    second = enrol(ready, "cam-2").certificate
    pem = ready.authority.revocation_list([first, second], now_ms()).decode()
    lists = [x509.load_pem_x509_crl(("-----BEGIN" + part).encode()) for part in pem.split("-----BEGIN")[1:]]
    serials = [[revoked.serial_number for revoked in each] for each in lists]
    assert serials == [[x509.load_pem_x509_certificate(c.encode()).serial_number] for c in (first, second)]
    assert all((each.next_update_utc - each.last_update_utc).days > 3650 for each in lists if each.next_update_utc)


def test_an_authority_of_before_is_taken_over(tmp_path: Path) -> None:
    """A folder of the first version has one CA and no file of all of them."""
    CertificateAuthority(tmp_path, hosts=(), now=now_ms())
    (tmp_path / "device-cas.pem").unlink()
    authority = CertificateAuthority(tmp_path, hosts=(), now=now_ms())
    assert authority.server_files().ca.read_bytes() == authority.ca_certificate()
