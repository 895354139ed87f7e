"""The manifest's ``preprocess`` block: optional, strict, and made for the first input."""

import json

import pytest
from test_protocol_golden import MANIFEST

from protocol.manifest import BadManifest, decode_manifest, encode_manifest

GREY, RGB = [-1, 8, 8, 1], [-1, 8, 8, 3]


def encoded(shape: list[int], block: object) -> bytes:
    value = json.loads(encode_manifest(MANIFEST))
    value["inputs"][0]["shape"] = shape
    value["preprocess"] = block
    return json.dumps(value).encode()


def test_a_manifest_without_it_stays_byte_for_byte_what_it_was() -> None:
    data = encode_manifest(MANIFEST)
    assert b"preprocess" not in data
    assert data == encode_manifest(decode_manifest(data))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        (GREY, {"mean": [0], "scale": [0.0039]}),
        (RGB, {"mean": [1, 2, 3], "scale": [-1, 1, 1], "resize": "crop"}),
    ],
)
def test_a_right_block_survives(shape: list[int], block: dict[str, object]) -> None:
    manifest = decode_manifest(encoded(shape, block))
    again = json.loads(encode_manifest(manifest))["preprocess"]
    assert {"resize": "stretch", **block} == again


@pytest.mark.parametrize(
    ("shape", "block", "said"),
    [
        (GREY, None, "preprocess"),
        (GREY, {}, "mean"),
        (GREY, {"mean": [0]}, "scale"),
        (GREY, {"mean": [0], "scale": [1], "colour": "bgr"}, "colour"),
        (GREY, {"mean": [0], "scale": [1], "resize": "pad"}, "resize"),
        (GREY, {"mean": ["a"], "scale": [1]}, "mean"),
        (GREY, {"mean": [0], "scale": [0]}, "no scale may be 0"),
        (GREY, {"mean": [0, 0, 0], "scale": [1, 1, 1]}, "need 1 numbers each"),
        (RGB, {"mean": [0], "scale": [1, 1, 1]}, "need 3 numbers each"),
        ([-1, 8, 8, 2], {"mean": [0, 0], "scale": [1, 1]}, "takes no picture"),
        ([-1, -1, -1, 3], {"mean": [0] * 3, "scale": [1] * 3}, "takes no picture"),
        ([64], {"mean": [0], "scale": [1]}, "takes no picture"),
        ([], {"mean": [0], "scale": [1]}, "takes no picture"),
    ],
)
def test_each_wrong_block_is_refused_by_name(shape: list[int], block: object, said: str) -> None:
    with pytest.raises(BadManifest, match=said):
        decode_manifest(encoded(shape, block))
