"""The terms of an order (forced, a shadow) reach the device's assignment, and stay there until another order."""

import msgspec
import pytest
from trust_world import DAY, World, birth, now_ms, source
from tuf.api.metadata import Metadata, Targets

from fleet_server.api_types import DeployRequest, RollbackRequest
from protocol.release import Assignment, ShadowTerms

TERMS = ShadowTerms(share=200, requests=40, seconds=60, agreement=900)


@pytest.fixture
def fleet(ready: World) -> World:
    """Device a; digits 1, 2 and wake 1."""
    ready.registry.put("a")
    for published in (source(content=b"one"), source(content=b"two"), source("wake")):
        ready.publish(published)
    return ready


def deploy(world: World, version: int, model: str = "digits", **terms: object) -> None:
    request = DeployRequest(model=model, version=version, all=True)
    world.rollouts.deploy(msgspec.structs.replace(request, **terms), "ann", now_ms())


def signed(world: World, model: str = "digits") -> Assignment:
    """Return what is in the signed bytes, not what the server remembers."""
    targets = Metadata[Targets].from_bytes(world.desired.current["a"].targets).signed.targets
    (found,) = [t.custom["assignment"] for path, t in targets.items() if f"/{model}-" in path and t.custom]
    return msgspec.convert(found, Assignment)


def test_an_order_without_terms_signs_none(fleet: World) -> None:
    deploy(fleet, 1)
    assert (signed(fleet).forced, signed(fleet).shadow) == (False, None)


def test_force_and_shadow_are_signed(fleet: World) -> None:
    deploy(fleet, 1, force=True, shadow=TERMS)
    assert (signed(fleet).forced, signed(fleet).shadow) == (True, TERMS)


ROLLBACKS = {"as usual: forced": ({}, True), "with --wait: bound by hold and hours": ({"force": False}, False)}


@pytest.mark.parametrize(("terms", "forced"), ROLLBACKS.values(), ids=ROLLBACKS.keys())
def test_a_rollback_is_forced_unless_it_may_wait(fleet: World, terms: dict[str, bool], forced: bool) -> None:
    deploy(fleet, 2, shadow=TERMS)
    fleet.rollouts.rollback(RollbackRequest(model="digits", to=1, all=True, **terms), "ann", now_ms())
    assert (signed(fleet).forced, signed(fleet).shadow) == (forced, None)


def test_what_is_signed_again_keeps_its_terms(fleet: World) -> None:
    deploy(fleet, 1, force=True, shadow=TERMS)
    first = signed(fleet)
    signings = {
        "renewed": lambda: fleet.rollouts.renew(now_ms() + 4 * DAY),
        "above what the device has seen": lambda: fleet.rollouts.answer_birth(
            "a", birth(director_version=41), now_ms()
        ),
        "with an order for another model": lambda: deploy(fleet, 1, "wake"),
    }
    for name, sign in signings.items():
        before = fleet.desired.current["a"].version
        sign()
        assert (fleet.desired.current["a"].version > before, signed(fleet)) == (True, first), name


def test_the_next_order_for_the_model_has_its_own_terms(fleet: World) -> None:
    deploy(fleet, 2, force=True, shadow=TERMS)
    deploy(fleet, 2)
    assert (signed(fleet).attempt, signed(fleet).forced, signed(fleet).shadow) == (2, False, None)
