"""An unmanaged server's dealings with the person who started it.

The bundles that were named on the command line, and what is told at start: what serves, where, a request to try.
"""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from agent.inference.engine import Engine
from agent.inference.generation import Generation
from agent.inference.loading import Servable, from_argument
from agent.inference.tensors import count, size

FEW_ELEMENTS = 128  # an example with more in its JSON would fill the screen


class Argument:
    """A bundle or a bare model that was named on the command line."""

    def __init__(self, path: Path, scratch: Path) -> None:
        """Read it, unpacking it into ``scratch`` if need be; raise `CannotServe`."""
        self._path = path
        self._scratch = scratch
        self.servable = from_argument(path, self._folder())

    def read_again(self) -> Servable:
        """Return what is there now; raise `CannotServe`."""
        folder = self._folder()
        found = from_argument(self._path, folder)
        if found.digest == self.servable.digest:
            shutil.rmtree(folder)  # nothing new was unpacked
        else:
            self.servable = found
        return self.servable

    def _folder(self) -> Path:
        return Path(mkdtemp(dir=self._scratch))


def greeting(engine: Engine, addresses: Sequence[str]) -> str:
    """Return the lines to print at start."""
    served = [_line(one) for one in engine.all()]
    return "\n".join(
        [
            "unmanaged: no fleet watches this server, and nothing it counts is reported",
            *(f"  serves {line}" for line in served),
            *(f"  listens on {address}" for address in addresses),
            f"try: {_example(engine.all()[0], addresses[0])}",
        ]
    )


def _line(one: Generation) -> str:
    signature = one.signature
    tensors = ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in signature.inputs)
    return f"{signature.model} {signature.version} on {one.runtime.value}, takes {tensors}"


def _example(one: Generation, address: str) -> str:
    signature = one.signature
    unix = address.removeprefix("unix:")
    where = f"curl -s --unix-socket {shlex.quote(unix)} http://localhost" if unix != address else f"curl -s {address}"
    url = f"{where}/v2/models/{signature.model}/infer"
    if len(signature.inputs) == 1 and count(signature.inputs[0]) > FEW_ELEMENTS:
        zeros = f"head -c {size(signature.inputs[0])} /dev/zero"
        header = "-H 'Inference-Header-Content-Length: 0'"
        return f"{zeros} | {url} {header} --data-binary @- --output -"
    return f"{url} -d {shlex.quote(_zeros(one))}"


def _zeros(one: Generation) -> str:
    inputs = ", ".join(
        f'{{"name": "{spec.name}", "datatype": "{spec.dtype}", "shape": {list(spec.shape)}, '
        f'"data": {[False if spec.dtype == "BOOL" else 0] * count(spec)}}}'.replace("False", "false")
        for spec in one.signature.inputs
    )
    return f'{{"inputs": [{inputs}]}}'
