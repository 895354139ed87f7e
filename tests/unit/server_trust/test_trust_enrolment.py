"""Letting devices in: what a token is worth, and what costs it a use."""

from collections.abc import Callable

import msgspec
import pytest
from trust_world import DAY, World, make_csr, now_ms

from fleet_server.api_types import TokenRequest
from fleet_server.enrolment import BadRequest, DeviceExists, NotReady, TokenRefused
from protocol.device_api import EnrolRequest, parse_token, pin_of


def token(world: World, **changes: object) -> str:
    return world.enrolment.create_token(msgspec.structs.replace(TokenRequest(), **changes), now_ms()).token


def request(text: str, device: str = "cam-1", **changes: object) -> EnrolRequest:
    parsed = parse_token(text)
    plain = EnrolRequest(token_id=parsed.id, secret=parsed.secret, device=device, csr=make_csr(device))
    return msgspec.structs.replace(plain, **changes)


def test_a_token_pins_the_ca_and_the_image_root(ready: World) -> None:
    parsed = parse_token(token(ready))
    first = ready.image.first_root()
    assert first is not None
    assert parsed.ca_key_sha256 == ready.authority.ca_key_sha256()
    assert parsed.image_root_sha256 == pin_of(first)


def test_the_secret_of_a_token_is_stored_only_as_a_hash(ready: World) -> None:
    parsed = parse_token(token(ready))
    assert parsed.secret not in repr(ready.registry.tokens)
    assert ready.registry.tokens[parsed.id].secret_sha256 == pin_of(parsed.secret.encode())


def test_an_enrolled_device_has_a_certificate_rights_labels_and_a_signed_empty_desire(ready: World) -> None:
    text = token(ready, labels={"site": "oslo"})
    answer = ready.enrolment.enrol(request(text), now_ms())
    device = ready.registry.device("cam-1")
    assert device is not None
    assert (device.certificate, device.labels) == (answer.certificate, {"site": "oslo"})
    assert answer.labels == {"site": "oslo"}
    assert (answer.image_root, answer.director_root) == (ready.image.first_root(), ready.director.roots()[0])
    assert ready.uplink.admitted == ["cam-1"]
    assert ready.desired.current["cam-1"].assigned == ()
    assert ready.uplink.retained["cam-1"].targets == ready.desired.current["cam-1"].targets


def test_nothing_is_given_out_before_the_roots_are_there(world: World) -> None:
    with pytest.raises(NotReady, match="keys init"):
        token(world)
    bare = EnrolRequest(token_id="0" * 16, secret="x" * 32, device="cam-1", csr=make_csr("cam-1"))
    with pytest.raises(NotReady):
        world.enrolment.enrol(bare, now_ms())


FREE_OF_CHARGE: list[tuple[str, Callable[[str], EnrolRequest], type[Exception]]] = [
    ("a bad CSR", lambda t: request(t, csr="nonsense"), BadRequest),
    ("a CSR for another", lambda t: request(t, csr=make_csr("cam-2")), BadRequest),
    ("an illegal id", lambda t: request(t, device="Cam 1"), BadRequest),
    ("a reserved id", lambda t: request(t, "server"), BadRequest),
    ("an id that is taken", lambda t: request(t, "taken"), DeviceExists),
    ("a wrong secret", lambda t: request(t, secret="x" * 32), TokenRefused),
]


@pytest.mark.parametrize(("spoilt", "error"), [c[1:] for c in FREE_OF_CHARGE], ids=[c[0] for c in FREE_OF_CHARGE])
def test_a_request_that_fails_costs_the_token_no_use(
    ready: World, spoilt: Callable[[str], EnrolRequest], error: type[Exception]
) -> None:
    ready.registry.put("taken")
    text = token(ready)
    with pytest.raises(error):
        ready.enrolment.enrol(spoilt(text), now_ms())
    ready.enrolment.enrol(request(text), now_ms())


def test_a_token_is_worth_its_uses_and_no_more(ready: World) -> None:
    text = token(ready, uses=2)
    for device in ("a", "b"):
        ready.enrolment.enrol(request(text, device), now_ms())
    with pytest.raises(TokenRefused):
        ready.enrolment.enrol(request(text, "c"), now_ms())
    assert ready.registry.device("c") is None


def test_a_token_ends(ready: World) -> None:
    text = token(ready, life_seconds=60)
    with pytest.raises(TokenRefused):
        ready.enrolment.enrol(request(text), now_ms() + DAY)


@pytest.mark.parametrize(
    "changes",
    [
        {"uses": 0},
        {"uses": 10**9},
        {"life_seconds": 0},
        {"life_seconds": 10**9},
        {"labels": {"bad key!": "x"}},
        {"labels": {"key": ""}},
        {"labels": {f"k{n}": "v" for n in range(33)}},
    ],
    ids=str,
)
def test_a_token_with_senseless_terms_is_refused(ready: World, changes: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        token(ready, **changes)
