"""Signed commands on a device: who may sign, by the Director root it has verified, and what is refused by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner
from tuf_world import DAY, NOW, TufWorld, open_trust

from agent.adapters.dsse import MAX_SIGNATURES, SignedCommands
from agent.adapters.trust import TufTrust
from agent.ports import Refusal
from protocol.codec import encode
from protocol.commands import PAYLOAD_TYPE, Command, SelfTestCommand, encode_command
from protocol.messages import CommandEnvelope, EnvelopeSignature
from protocol.names import MAX_COMMAND_MESSAGE
from protocol.states import RejectReason

COMMAND = Command(
    device="cam-7", id="c-1", sequence=9, issued=NOW, expires=NOW + 60_000, command=SelfTestCommand(model="digits")
)


def sealed(*signers: CryptoSigner, payload: bytes | None = None, kind: str = PAYLOAD_TYPE) -> CommandEnvelope:
    """Sign as the server does."""
    envelope = Envelope(encode_command(COMMAND) if payload is None else payload, kind, {})
    signatures = tuple(
        EnvelopeSignature(keyid=signed.keyid, sig=bytes.fromhex(signed.signature))
        for signed in (envelope.sign(signer) for signer in signers)
    )
    return CommandEnvelope(payload=envelope.payload, payload_type=kind, signatures=signatures)


@dataclass
class World:
    """A device, and everybody who might command it."""

    tuf: TufWorld
    trust: TufTrust

    @property
    def director(self) -> CryptoSigner:
        return self.tuf.director.keys["targets"]

    def open(self, message: CommandEnvelope | bytes, at: int = NOW) -> Command:
        payload = message if isinstance(message, bytes) else encode(message)
        return SignedCommands(self.trust.command_keys).open(payload, at)


@pytest.fixture
def world(tmp_path: Path) -> World:
    tuf = TufWorld()
    return World(tuf=tuf, trust=open_trust(tuf, tmp_path))


def test_a_command_signed_by_the_directors_targets_key_is_read(world: World) -> None:
    assert COMMAND == world.open(sealed(world.director))


def test_it_is_read_before_any_desired_state_has_come(world: World) -> None:
    """The root of the enrolment says who may sign."""
    assert 0 == world.trust.versions().director
    assert COMMAND == world.open(sealed(world.director))


def test_signatures_of_strangers_beside_a_good_one_do_no_harm(world: World) -> None:
    assert COMMAND == world.open(sealed(CryptoSigner.generate_ed25519(), world.director))


FORGERS: dict[str, Callable[[World], CommandEnvelope]] = {
    "nobody": lambda _: sealed(),
    "a key made up": lambda _: sealed(CryptoSigner.generate_ed25519()),
    "the Image repository's targets key": lambda w: sealed(w.tuf.image.keys["targets"]),
    "the Image repository's snapshot key": lambda w: sealed(w.tuf.image.keys["snapshot"]),
    "the Director's snapshot key": lambda w: sealed(w.tuf.director.keys["snapshot"]),
    "the Director's timestamp key": lambda w: sealed(w.tuf.director.keys["timestamp"]),
    "the Director's root key": lambda w: sealed(w.tuf.director.keys["root"]),
    "a stranger who claims the Director's key id": lambda w: _renamed(
        sealed(CryptoSigner.generate_ed25519()), w.director
    ),
    "the Director, over another payload": lambda w: _with(sealed(w.director), payload=b'{"device":"cam-7"}'),
}


def _renamed(message: CommandEnvelope, whose: CryptoSigner) -> CommandEnvelope:
    signature = EnvelopeSignature(keyid=whose.public_key.keyid, sig=message.signatures[0].sig)
    return _with(message, signatures=(signature,))


def _with(message: CommandEnvelope, **changes: Any) -> CommandEnvelope:
    facts = {"payload": message.payload, "payload_type": message.payload_type, "signatures": message.signatures}
    return CommandEnvelope(**(facts | changes))


@pytest.mark.parametrize("forge", FORGERS.values(), ids=list(FORGERS))
def test_nobody_else_may_command(world: World, forge: Callable[[World], CommandEnvelope]) -> None:
    assert RejectReason.BAD_SIGNATURE is refusal(world, forge(world))


def refusal(world: World, message: CommandEnvelope | bytes, at: int = NOW) -> RejectReason:
    with pytest.raises(Refusal) as refused:
        world.open(message, at)
    return refused.value.reason


def test_every_flipped_bit_of_a_message_is_refused(world: World) -> None:
    genuine = encode(sealed(world.director))
    for position in range(0, len(genuine), 7):
        spoilt = genuine[:position] + bytes([genuine[position] ^ 1]) + genuine[position + 1 :]
        assert refusal(world, spoilt) in {RejectReason.BAD_SIGNATURE, RejectReason.MALFORMED}, position


def test_after_a_rotation_the_old_key_counts_no_more_and_the_new_one_does(world: World) -> None:
    old = world.director
    root = world.tuf.director.rotate("targets")
    assert COMMAND == world.open(sealed(old))  # the device has not heard of it
    world.trust.verify(world.tuf.assign(root=[root]), NOW)
    assert RejectReason.BAD_SIGNATURE is refusal(world, sealed(old))
    assert COMMAND == world.open(sealed(world.director))


def test_what_was_learned_of_the_keys_survives_a_restart(world: World, tmp_path: Path) -> None:
    old = world.director
    world.trust.verify(world.tuf.assign(root=[world.tuf.director.rotate("targets")]), NOW)
    world.trust = open_trust(world.tuf, tmp_path)
    assert RejectReason.BAD_SIGNATURE is refusal(world, sealed(old))
    assert COMMAND == world.open(sealed(world.director))


def test_a_threshold_of_two_needs_two_keys(world: World) -> None:
    second = CryptoSigner.generate_ed25519()
    world.tuf.director.seconds["targets"] = second
    world.trust.verify(world.tuf.assign(root=[world.tuf.director.sign_root()]), NOW)
    assert RejectReason.BAD_SIGNATURE is refusal(world, sealed(world.director))
    assert COMMAND == world.open(sealed(world.director, second))


def test_a_root_that_has_expired_names_nobody(world: World) -> None:
    message = sealed(world.director)
    assert COMMAND == world.open(message, NOW + 364 * DAY)
    assert RejectReason.EXPIRED is refusal(world, message, NOW + 365 * DAY)


UNREADABLE: dict[str, Callable[[World], CommandEnvelope | bytes]] = {
    "nothing": lambda _: b"",
    "not an envelope": lambda _: b"\x00[]",
    "an unknown codec": lambda _: b"\x09{}",
    "over the cap": lambda _: b"\x00" + b" " * MAX_COMMAND_MESSAGE,
    "base64 that is none": lambda _: b'\x00{"payload":"=","payloadType":"x","signatures":[]}',
    "of another type": lambda w: sealed(w.director, kind="application/vnd.in-toto+json"),
    "a key that signed twice": lambda w: _with(sealed(w.director), signatures=sealed(w.director).signatures * 2),
    "more signatures than anybody needs": lambda w: _with(
        sealed(w.director),
        signatures=tuple(EnvelopeSignature(keyid=str(n), sig=b"x") for n in range(MAX_SIGNATURES + 1)),
    ),
    "signed, but not JSON": lambda w: sealed(w.director, payload=b"{"),
    "signed, with a field that nobody knows": lambda w: sealed(w.director, payload=_changed(b'"id"', b'"x":1,"id"')),
    "signed, a command that nobody knows": lambda w: sealed(w.director, payload=_changed(b"self-test", b"fly")),
    "signed, a model with no name": lambda w: sealed(w.director, payload=_changed(b'"digits"', b'""')),
    "signed, a path for a model": lambda w: sealed(w.director, payload=_changed(b"digits", b"../x")),
    "signed, sequence 0": lambda w: sealed(w.director, payload=_changed(b'"sequence":9', b'"sequence":0')),
    "signed, a sequence that is no number": lambda w: sealed(
        w.director, payload=_changed(b'"sequence":9', b'"sequence":"9"')
    ),
    "signed, an id to write paths with": lambda w: sealed(w.director, payload=_changed(b'"c-1"', b'"../c"')),
    "signed metadata in place of a command": lambda w: sealed(w.director, payload=w.tuf.director.roots[0]),
}


def _changed(what: bytes, to: bytes) -> bytes:
    genuine = encode_command(COMMAND)
    assert what in genuine
    return genuine.replace(what, to)


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=list(UNREADABLE))
def test_what_cannot_be_read_is_refused_as_malformed(
    world: World, make: Callable[[World], CommandEnvelope | bytes]
) -> None:
    assert RejectReason.MALFORMED is refusal(world, make(world))
