import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import topics
from protocol.device_api import BadToken, EnrolmentToken, parse_token
from protocol.manifest import Needs, TensorSpec
from protocol.names import DEVICE_ID, IllegalName, check_device_id, short_digest
from protocol.release import Release, bundle_path, floor_path, is_bundle_path, is_floor_path
from protocol.topics import Channel, DeviceTopic, device_topic, every_device, everything_of, parse, shared

device_ids = st.from_regex(DEVICE_ID, fullmatch=True)


@given(device_ids, st.sampled_from(Channel))
def test_a_topic_that_was_built_is_parsed(device: str, channel: Channel) -> None:
    assert DeviceTopic(device=device, channel=channel) == parse(device_topic(device, channel))


@given(st.text(max_size=40))
def test_any_other_topic_is_not_ours(text: str) -> None:
    assert parse(text) is None
    assert parse(f"ew/1/d/{text}") is None or text.count("/") == 2


NOT_OURS = ["", "ew/1/d/", "ew/1/d/cam", "ew/1/d/cam/up/t/x", "ew/1/d/Cam/up/t", "ew/1/d/+/up/t", "ew/2/d/cam/up/t",
            "ew/1/d/cam/up", "ew/1/d//up/t", "ew/1/srv/state", "ew/1/d/a/b/up/t", "ew/1/d/cam/up/t\n"]  # fmt: skip


@pytest.mark.parametrize("topic", NOT_OURS)
def test_foreign_topics_are_none(topic: str) -> None:
    assert parse(topic) is None


def test_filters_match_what_the_rights_allow() -> None:
    assert "ew/1/d/+/up/t" == every_device(Channel.TELEMETRY)
    assert "$share/ingest/ew/1/d/+/up/e" == shared(every_device(Channel.EVENT))
    assert "ew/1/d/cam/down/#" == everything_of("cam", "down")


BAD_IDS = ["", "-a", "A", "a" * 64, "a/up", "+", "#", "a b", "ä", "a\n", "server", "srv", "admin"]


@pytest.mark.parametrize("device", BAD_IDS)
def test_a_bad_device_id_is_refused_before_it_becomes_a_topic(device: str) -> None:
    with pytest.raises(IllegalName):
        check_device_id(device)
    if device not in ("server", "srv", "admin"):  # legal in shape, reserved at enrolment
        with pytest.raises(IllegalName):
            device_topic(device, Channel.STATE)


def test_examples_in_the_docstring_hold() -> None:
    assert 0 == doctest.testmod(topics).failed


def test_a_short_digest_is_the_beginning_of_a_whole_one() -> None:
    assert "ab" * 8 == short_digest("ab" * 32)
    with pytest.raises(IllegalName):
        short_digest("ab" * 8)


RELEASE = Release(
    model="digits",
    version=3,
    variant="int8",
    inputs=(TensorSpec(name="i", dtype="INT8", shape=(1,)),),
    outputs=(TensorSpec(name="o", dtype="INT8", shape=(1,)),),
    needs=Needs(memory=1),
)


def test_target_paths_are_told_apart() -> None:
    bundle, floor = bundle_path(RELEASE), floor_path("main", "digits")
    assert ("models/main/digits-3-int8.ewb", "models/main/digits.floor") == (bundle, floor)
    assert (True, False) == (is_bundle_path(bundle), is_floor_path(bundle))
    assert (False, True) == (is_bundle_path(floor), is_floor_path(floor))


@pytest.mark.parametrize(
    "path", ["models/main/digits-0-int8.ewb", "models/../digits-1-int8.ewb", "digits-1-int8.ewb"]
)
def test_odd_paths_are_no_bundles(path: str) -> None:
    assert not is_bundle_path(path)


TOKEN = EnrolmentToken(id="0123abcd", secret="s" * 24, ca_key_sha256="a" * 64, image_root_sha256="b" * 64)


def test_a_token_is_read_as_it_was_written_and_keeps_its_secret() -> None:
    assert TOKEN == parse_token(f" {TOKEN}\n")
    assert "sss" not in repr(TOKEN)


@pytest.mark.parametrize("text", ["", "a.b.c.d", str(TOKEN)[:-1], str(TOKEN) + "0", str(TOKEN).replace("s", "!")])
def test_a_broken_token_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(BadToken) as refused:
        parse_token(text)
    assert not text or text not in str(refused.value)
