"""Drives the readers with atheris, guided by coverage: ``python tests/fuzz/fuzz_atheris.py [--seconds N] [TARGET…]``.

Each target runs in a process of its own, for libFuzzer ends the process that it runs in. A finding is left in
``build/fuzz/crashes/``; shrink it, mend the reader, and keep it in ``tests/fuzz/corpus/<target>/``.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"
sys.path[:0] = [str(ROOT), str(HERE)]


def main() -> int:
    """Fuzz every target in turn; the exit code is 1 when one was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (%(default)s)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        fuzz(options.targets[0], options.seconds)
        return 0
    names = options.targets or [path.name for path in sorted((HERE / "corpus").iterdir())]
    broken = [name for name in names if not survives(name, options.seconds)]
    print(f"broken: {', '.join(broken)}" if broken else f"no reader was broken: {', '.join(names)}")  # noqa: T201 - a script that prints
    return 1 if broken else 0


def survives(name: str, seconds: int) -> bool:
    """Fuzz one target in a child."""
    print(f"== {name}", flush=True)  # noqa: T201 - a program for a terminal
    command = [sys.executable, __file__, "--inside", "--seconds", str(seconds), name]
    return subprocess.run(command, check=False, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}).returncode == 0


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target, and end the process."""
    import atheris

    with atheris.instrument_imports(include=["agent", "protocol", "runtime", "json", "zipfile"]):
        from fuzz_targets import CORPUS, MAX_INPUT, TARGETS
    grown, crashes = BUILD / "corpus" / name, BUILD / "crashes"
    for folder in (grown, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT // 4}", "-timeout=10", "-rss_limit_mb=1024"]
    quiet = ["-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={crashes}/{name}-"]
    atheris.Setup([sys.argv[0], *limits, *quiet, str(grown), str(CORPUS / name)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
