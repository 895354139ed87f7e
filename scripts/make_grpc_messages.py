"""Makes ``descriptor.py`` of agent/inference/grpc_server from its ``inference.proto``. Needs grpcio-tools."""

import base64
import sys
import tempfile
import textwrap
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

FOLDER = Path(__file__).parents[1] / "agent" / "inference" / "grpc_server"
PROTO = "inference.proto"
HEADER = '''"""``inference.proto``, compiled. Made by ``python scripts/make_grpc_messages.py``; do not edit."""

DESCRIPTOR_SET = """
'''


def compiled() -> bytes:
    """Return the serialised descriptor set of the .proto file."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "set")
        include = str(files("grpc_tools") / "_proto")
        status = protoc.main(
            ["protoc", f"-I{FOLDER}", f"-I{include}", f"--descriptor_set_out={target}", str(FOLDER / PROTO)]
        )
        if status:
            sys.exit(f"error: protoc refuses {PROTO}")
        return target.read_bytes()


def module() -> str:
    """Return the text of the generated module."""
    text = base64.b64encode(compiled()).decode()
    return HEADER + "\n".join(textwrap.wrap(text, 112)) + '\n"""\n'


if __name__ == "__main__":
    (FOLDER / "descriptor.py").write_text(module())
