"""Makes the bundle folders v1, v2 and v3 out of what `train.py` wrote, and puts the held-out images beside them.

python examples/digits/pack_all.py --trained build/digits
"""

import argparse
import json
import shutil
from pathlib import Path

from converters.pack import Order, pack, write_folder

HERE = Path(__file__).parent
TITLES = {
    "v1": "digits, first training run",
    "v2": "digits, second training run",
    "v3": "digits, third training run",
}


def pack_version(name: str, trained: Path, lineage: dict[str, str]) -> None:
    """Pack one version into its folder here."""
    order = Order(
        model=trained / f"{name}.tflite",
        samples=trained / f"{name}-samples.npz",
        classes=trained / "classes.txt",
        name="digits",
        title=TITLES[name],
        lineage=lineage,
    )
    packed = pack(order)
    write_folder(packed, HERE / name)
    print(f"{name}: {sum(len(content) for content in packed.members.values())} bytes in {HERE / name}")


def main() -> None:
    """Pack all versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, default=Path("build/digits"), help="folder that train.py wrote")
    trained: Path = parser.parse_args().trained
    lineages = json.loads((trained / "lineage.json").read_text(encoding="utf-8"))
    for name in TITLES:
        pack_version(name, trained, lineages[name])
    shutil.copyfile(trained / "heldout.npz", HERE / "heldout.npz")


if __name__ == "__main__":
    main()
