"""The protocol's gRPC messages as Python classes.

Built in a pool of their own from the compiled descriptor: the classes need no code generated for one version of
protobuf, and stand beside a client's in one process. Alone here is protobuf imported.
"""

import base64
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import DecodeError, Message

from agent.inference.grpc_server.descriptor import DESCRIPTOR_SET

SERVICE = "inference.GRPCInferenceService"


def _load_pool() -> descriptor_pool.DescriptorPool:
    compiled = descriptor_pb2.FileDescriptorSet.FromString(base64.b64decode(DESCRIPTOR_SET))
    pool = descriptor_pool.DescriptorPool()
    for file in compiled.file:
        pool.Add(file)
    return pool


_POOL = _load_pool()


def message(name: str) -> Any:
    """Return the class of a message; its fields are known to protobuf only."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))


def from_json(name: str, value: object) -> Message:
    """Return a message with what a JSON object holds; fields that gRPC does not have are left out."""
    built: Message = json_format.ParseDict(value, message(name)(), ignore_unknown_fields=True)
    return built


__all__ = ["SERVICE", "DecodeError", "Message", "from_json", "message"]
