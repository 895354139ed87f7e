"""Parts that the data plane's unit tests share: example bundles and an engine that serves them."""

import hashlib
from pathlib import Path

import msgspec
import numpy as np

from agent.inference.engine import Engine
from agent.inference.loading import Servable, Settings, from_folder
from agent.inference.statistics import Statistics
from agent.inference.truth import TruthRing
from protocol.manifest import MANIFEST_NAME, decode_manifest, encode_manifest

EXAMPLES = Path(__file__).parents[3] / "examples" / "digits"
NOON = 1_800_000_000_000  # UTC ms, a full minute
IMAGE = np.zeros(64, np.int8).tobytes()


def servable(root: Path, example: str, version: int, **changes: object) -> Servable:
    """Lay out an example with a published version, and other fields of its manifest changed."""
    source = EXAMPLES / example
    manifest = decode_manifest((source / MANIFEST_NAME).read_bytes())
    manifest = msgspec.structs.replace(manifest, version=version, **changes)
    encoded = encode_manifest(manifest)
    digest = hashlib.sha256(encoded).hexdigest()
    folder = root / digest
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / MANIFEST_NAME).write_bytes(encoded)
    return from_folder(folder, digest)


def engine(**limits: object) -> Engine:
    settings = limits.pop("settings", Settings())
    assert isinstance(settings, Settings)
    return Engine(settings=settings, statistics=Statistics(), truth=TruthRing(), now_ms=lambda: NOON, **limits)
