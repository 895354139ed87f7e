"""Which TFLite runtimes are installed, found without importing them: the control process stays small."""

from importlib.util import find_spec

from protocol.states import RuntimeName

_MODULES = {RuntimeName.LITERT: "ai_edge_litert", RuntimeName.TFLITE_RUNTIME: "tflite_runtime"}


def installed_runtimes(choice: str = "auto") -> tuple[RuntimeName, ...]:
    """Return what the data plane may use: all that are installed, or only the one the settings choose."""
    found = tuple(name for name, module in _MODULES.items() if find_spec(module) is not None)
    return found if choice == "auto" else tuple(name for name in found if name.value == choice)
