"""Pictures as inputs: what they become, and what is refused before it can hurt."""

import io
import json
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from protocol_world import RGB, RGB_PREPROCESS, World, world

from protocol.manifest import Preprocess, Resize, TensorSpec
from runtime.images import MAX_IMAGE, MAX_PIXELS, BadImage, ImageReader, is_image
from runtime.preprocess import quantise

GREY = TensorSpec(name="image", dtype="INT8", shape=(1, 8, 8, 1), scale=1 / 255, zero_point=-128)
GREY_PREPROCESS = Preprocess(mean=(0.0,), scale=(1 / 255,))
FLOAT = TensorSpec(name="image", dtype="FP32", shape=(1, 6, 4, 3))


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, mode if channels == 1 else None).convert(
        mode
    )


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def expected(image: Image.Image, spec: TensorSpec, preprocess: Preprocess) -> bytes:
    """Normalise in floating point and quantise, as the training side does it."""
    _, height, width, channels = spec.shape
    small = image.convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.BILINEAR)
    real = np.asarray(small, np.float64).reshape(height, width, channels)
    return quantise((real - np.array(preprocess.mean)) * np.array(preprocess.scale), spec).tobytes()


@pytest.mark.parametrize(
    ("spec", "preprocess"),
    [
        pytest.param(GREY, GREY_PREPROCESS, id="grey-int8"),
        pytest.param(RGB, RGB_PREPROCESS, id="rgb-int8-per-channel"),
        pytest.param(FLOAT, Preprocess(mean=(127.5,) * 3, scale=(1 / 127.5,) * 3), id="rgb-fp32"),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA"])
def test_the_table_gives_what_normalising_and_quantising_gives(
    spec: TensorSpec, preprocess: Preprocess, mode: str
) -> None:
    image = picture(31, 17, "RGB").convert(mode) if mode == "P" else picture(31, 17, mode)
    assert expected(image, spec, preprocess) == ImageReader(spec, preprocess).read(encoded(image))


def test_a_large_jpeg_is_decoded_at_a_scale_and_looks_the_same() -> None:
    smooth = Image.linear_gradient("L").resize((1600, 1200)).convert("RGB")
    reader = ImageReader(RGB, RGB_PREPROCESS)
    got = np.frombuffer(reader.read(encoded(smooth, "JPEG", quality=95)), np.int8).astype(int)
    want = np.frombuffer(expected(smooth, RGB, RGB_PREPROCESS), np.int8).astype(int)
    assert np.abs(got - want).max() <= 3


def test_crop_keeps_the_middle_and_its_proportions() -> None:
    image = Image.new("L", (30, 10), 0)
    image.paste(255, (9, 0, 21, 10))  # the middle square is white, and what the filter sees beside it
    crop = ImageReader(GREY, Preprocess(mean=(0.0,), scale=(1 / 255,), resize=Resize.CROP))
    assert np.frombuffer(crop.read(encoded(image)), np.int8).tolist() == [127] * 64
    stretch = ImageReader(GREY, GREY_PREPROCESS)
    assert np.frombuffer(stretch.read(encoded(image)), np.int8).min() == -128


def huge_png(width: int, height: int) -> bytes:
    """Return a PNG that announces more pixels than it has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    return encoded(picture(9, 9), "PNG", save_all=True, append_images=[picture(9, 9, seed=1)])


def gif() -> bytes:
    return encoded(picture(9, 9), "GIF")


BAD = [
    pytest.param(b"", "neither a JPEG nor a PNG", id="empty"),
    pytest.param(b"hello", "neither a JPEG nor a PNG", id="text"),
    pytest.param(gif(), "neither a JPEG nor a PNG", id="gif"),
    pytest.param(encoded(picture(9, 9), "BMP"), "neither a JPEG nor a PNG", id="bmp"),
    pytest.param(encoded(picture(99, 99), "JPEG")[:400], "cannot be decoded", id="truncated-jpeg"),
    pytest.param(encoded(picture(99, 99))[:400], "cannot be decoded", id="truncated-png"),
    pytest.param(b"\xff\xd8\xff" + bytes(99), "cannot be decoded", id="jpeg-of-zeros"),
    pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(99), "cannot be decoded", id="png-of-zeros"),
    pytest.param(animated(), "animated", id="animated"),
    pytest.param(encoded(Image.new("I;16", (9, 9))), "16 bits a channel", id="16-bit"),
    pytest.param(huge_png(5001, 5000), f"at most {MAX_PIXELS}", id="too-many-pixels"),
    pytest.param(huge_png(10_000, 10_000), f"more than {MAX_PIXELS}", id="bomb-that-pillow-warns-of"),
    pytest.param(huge_png(60_000, 60_000), f"more than {MAX_PIXELS}", id="bomb-that-pillow-refuses"),
    pytest.param(huge_png(4000, 4000), "cannot be decoded", id="announces-more-than-it-has"),
]


@pytest.mark.parametrize(("data", "said"), BAD)
def test_each_bad_picture_is_refused_with_the_reason(data: bytes, said: str) -> None:
    with pytest.raises(BadImage, match=said):
        ImageReader(GREY, GREY_PREPROCESS).read(data)


def test_a_picture_of_too_many_bytes_is_not_even_opened() -> None:
    with pytest.raises(BadImage, match=f"at most {MAX_IMAGE}"):
        ImageReader(GREY, GREY_PREPROCESS).read(b"\xff\xd8\xff" + bytes(MAX_IMAGE))


def test_pictures_are_told_by_their_first_bytes() -> None:
    assert [True, True, False, False] == [
        is_image(data) for data in (encoded(picture(2, 2), "JPEG"), encoded(picture(2, 2)), gif(), b"")
    ]


# ---------------------------------------------------------------- over the wire
@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as one:
        yield one


IMAGE = picture(31, 17)
WANT = np.frombuffer(expected(IMAGE, RGB, RGB_PREPROCESS), np.int8)


@pytest.mark.parametrize("shape", [[1], [1, 1]], ids=str)
@pytest.mark.parametrize("transport", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def test_stock_clients_send_a_picture_as_bytes(plane: World, transport: object, shape: list[int]) -> None:
    address = plane.http if transport is tritonclient.http else plane.grpc
    with transport.InferenceServerClient(address) as client:
        tensor = transport.InferInput("picture", shape, "BYTES")
        tensor.set_data_from_numpy(np.array([encoded(IMAGE)], object).reshape(shape))
        got = client.infer("rgb", [tensor]).as_numpy("picture_out")
    assert WANT.tolist() == got[0].tolist()


def test_metadata_shows_the_tensors_own_type(plane: World) -> None:
    with tritonclient.http.InferenceServerClient(plane.http) as client:
        shown = client.get_model_metadata("rgb")["inputs"]
    assert [{"name": "picture", "datatype": "INT8", "shape": [1, 6, 4, 3]}] == shown


def post(plane: World, body: bytes, json_length: int) -> tuple[int, bytes]:
    import urllib3

    headers = {"Inference-Header-Content-Length": str(json_length)}
    answer = urllib3.request("POST", f"http://{plane.http}/v2/models/rgb/infer", body=body, headers=headers)
    return answer.status, answer.data


def described(**more: object) -> bytes:
    tensor = {"name": "picture", "shape": [1], "datatype": "BYTES", **more}
    return json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()


def test_a_raw_body_may_be_a_picture(plane: World) -> None:
    status, body = post(plane, encoded(IMAGE), 0)
    assert (200, WANT.tobytes()) == (status, body[-WANT.size :])


@pytest.mark.parametrize("prefix", [True, False], ids=["with-its-length", "bare"])
@pytest.mark.parametrize("announced", [True, False], ids=["size-given", "size-left-out"])
def test_the_size_and_the_length_of_a_lone_picture_may_be_left_out(
    plane: World, prefix: bool, announced: bool
) -> None:
    data = encoded(IMAGE)
    data = struct.pack("<I", len(data)) + data if prefix else data
    head = described(**({"parameters": {"binary_data_size": len(data)}} if announced else {}))
    status, body = post(plane, head + data, len(head))
    assert (200, WANT.tobytes()) == (status, body[-WANT.size :])


@pytest.mark.parametrize(
    ("head", "data", "said"),
    [
        pytest.param(described(), struct.pack("<I", 5) + b"hello", "neither a JPEG nor a PNG", id="no-picture"),
        pytest.param(described(), struct.pack("<I", 50) + b"hello", "longer than what is left", id="length"),
        pytest.param(described(), b"\x01", "longer than what is left", id="no-length"),
        pytest.param(described(), (struct.pack("<I", 1) + b"x") * 2, "1 images are expected, got 2", id="two"),
        pytest.param(described(), bytes(4) * 5000, "1 images are expected, got 2", id="many-empty"),
        pytest.param(described(shape=[2]), b"xxxx", "images have shape [1], got [2]", id="shape"),
        pytest.param(described(data=["x"]), b"", "not within JSON", id="json"),
        pytest.param(described(name="other"), b"xxxx", "unknown input", id="name"),
        pytest.param(described(), b"", "not within JSON", id="nothing"),
        pytest.param(described(datatype="INT8"), b"xxxx", "shape [1, 6, 4, 3] is expected", id="not-bytes"),
    ],
)
def test_each_wrong_way_to_send_a_picture_says_what_is_wrong(
    plane: World, head: bytes, data: bytes, said: str
) -> None:
    status, body = post(plane, head + data, len(head))
    assert (400, True) == (status, said in json.loads(body)["error"]), body


@pytest.mark.parametrize(("data", "said"), BAD)
def test_a_bad_picture_is_400_and_counts_as_an_error(plane: World, data: bytes, said: str) -> None:
    plane.engine.statistics.take_delta()
    head = described()
    status, body = post(plane, head + struct.pack("<I", len(data)) + data, len(head))
    assert (400, True) == (status, said in json.loads(body)["error"]), body
    (taken,) = plane.engine.statistics.take_delta()
    assert (1, 1) == (taken.requests, taken.errors)


def test_a_model_without_preprocessing_takes_no_pictures(plane: World) -> None:
    with tritonclient.http.InferenceServerClient(plane.http) as client:
        tensor = tritonclient.http.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([encoded(IMAGE)], object))
        with pytest.raises(tritonclient.http.InferenceServerException, match="datatype INT8 is expected, got BYTES"):
            client.infer("digits", [tensor])
