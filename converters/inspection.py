"""Reads a bundle, file or folder, and holds every member against the manifest's hashes. Runs nothing."""

import os
from pathlib import Path
from typing import IO

from converters.refusal import Refused
from protocol.bundle import BadBundle, digest_of_stream, unpack
from protocol.manifest import MANIFEST_NAME, BadManifest, Manifest, decode_manifest
from protocol.names import MAX_BUNDLE, MAX_MANIFEST


def inspect(path: Path) -> Manifest:
    """Return the manifest of a bundle whose members are what it says; raise `Refused`."""
    if path.is_dir():
        return _inspect_folder(path)
    if not path.is_file():
        raise Refused(f"{path}: there is no such file or folder")
    try:
        with path.open("rb") as file:
            return unpack(file, _nowhere)
    except BadBundle as error:
        raise Refused(f"{path}: {error}") from error


def _nowhere(name: str) -> IO[bytes]:  # noqa: ARG001 - the shape of `OpenMember`
    return Path(os.devnull).open("wb")  # `unpack` hashes on the way, which is all that is wanted here


def _inspect_folder(folder: Path) -> Manifest:
    manifest = _read_manifest(folder / MANIFEST_NAME)
    for name, expected in manifest.members.items():
        found = _digest(folder / name)
        if found != expected:
            raise Refused(f"{folder / name}: SHA-256 is {found}, the manifest says {expected}")
    return manifest


def _read_manifest(path: Path) -> Manifest:
    if not path.is_file():
        raise Refused(f"{path}: there is no such file, so this is not a bundle folder")
    with path.open("rb") as file:
        content = file.read(MAX_MANIFEST + 1)
    try:
        return decode_manifest(content)
    except BadManifest as error:
        raise Refused(f"{path}: {error}") from error


def _digest(path: Path) -> str:
    if not path.is_file():
        raise Refused(f"{path}: the manifest lists this file, but it is missing")
    if path.stat().st_size > MAX_BUNDLE:
        raise Refused(f"{path}: over the cap of {MAX_BUNDLE} bytes")
    with path.open("rb") as file:
        return digest_of_stream(file)
