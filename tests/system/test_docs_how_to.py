"""The pages that need no fleet, typed as they stand."""

import pytest
from docs_shell import DOCS, empty_home, processes_naming, type_page, typed_in

HOW_TO = DOCS / "how-to"


@pytest.mark.parametrize(
    "name",
    [
        "ask-a-model.md",
        "serve-without-a-fleet.md",
        "publish-a-model.md",
        "pipelines.md",
        "capture.md",
        "call-from-python.md",
        "../explanation/measuring.md",
        "use-an-accelerator.md",
    ],
)
def test_every_command_of_the_page_works_and_says_what_is_shown(name: str) -> None:
    with empty_home() as home:
        said = type_page(HOW_TO / name, home, [8000, 8001, 8002])
        left = processes_naming(home)
    assert {0} == {block.code for block in said}, "\n".join(block.text for block in said)
    assert {} == {block.typed: block.absent for block in said if block.absent}
    assert [] == left


CALLS = (
    "http://localhost/v2\n",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/digits/ready",
    "/v2/models/digits\n",
    "/v2/models/digits/config",
    "/v2/models/digits/versions/",
    "/v2/models/digits/infer -d",
    "Inference-Header-Content-Length: $(stat",
    "Inference-Header-Content-Length: 0' --data-binary @five.bin",
    "Inference-Header-Content-Length: 0' \\\n    --data-binary @five.jpg",
    '"classification": 2',
    "Content-Encoding: gzip",
    '"priority": 1, "timeout"',
    "/v2/models/digits/feedback",
    "/v2/models/digits/stats",
    "/v2/models/stats",
    "/v2/repository/index",
    "/v2/repository/models/digits/load",
    "/v2/repository/models/digits/unload",
    "/metrics",
    "tritonclient.http",
)


@pytest.mark.parametrize("call", CALLS)
def test_every_kind_of_call_is_shown_in_a_block_that_is_run(call: str) -> None:
    assert any(call in typed for typed in typed_in(HOW_TO / "ask-a-model.md"))


TRITON = (
    "is_server_live",
    "is_server_ready",
    "is_model_ready",
    "get_server_metadata",
    "get_model_metadata",
    "get_model_config",
    "get_model_repository_index",
    "get_inference_statistics",
    "load_model",
    "unload_model",
    "class_count=",
    "model_version=",
    "request_id=",
    "priority=",
    "timeout=",
)
CLIENTS = {
    "agent.client": ("ready", "metadata", "infer", "priority=", "timeout_us=", "version=", "classes", "feedback"),
    "tritonclient.http": (*TRITON, "request_compression_algorithm"),
    "tritonclient.grpc": (*TRITON, "compression_algorithm"),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_is_shown_with_every_call_it_has(client: str) -> None:
    programs = [typed for typed in typed_in(HOW_TO / "call-from-python.md") if client in typed]
    assert [] == [call for call in CLIENTS[client] if not any(call in program for program in programs)]
