"""Measures what a second core brings: requests per second of two clients on two interpreters, over one on one.

Each client is a process of its own; while they ask they leave the cores to the model, which needs all of them.
"""

import contextlib
import multiprocessing
import os
import statistics
import time
from multiprocessing.synchronize import Barrier

import numpy as np
from parts import RUNTIMES, Client, need_mobilenet, note, options, result, serving


def main() -> None:
    """Answer the question."""
    given = options(__doc__ or "", 5)
    rounds, seconds = (1, 2.0) if given.quick else (given.rounds, 4.0)
    figures: dict[str, object] = {"cores": len(os.sched_getaffinity(0))}
    for runtime in RUNTIMES:
        note(f"MobileNetV2 on {runtime}")
        with serving(need_mobilenet(), runtime, more=("--instances", "2")) as server:
            pairs = [(rate(server.unix, 1, seconds), rate(server.unix, 2, seconds)) for _ in range(rounds)]
        for one, two in pairs:
            note(f"  one client {one:.1f}/s, two {two:.1f}/s")
        figures[runtime] = {"per_second": pairs, "two_over_one": round(statistics.median(b / a for a, b in pairs), 3)}
    result("inference_parallel", **figures)


def rate(unix: str, clients: int, seconds: float) -> float:
    """Return how many requests per second so many clients got answered."""
    context = multiprocessing.get_context("fork")
    ready, answered = context.Barrier(clients), context.SimpleQueue()
    askers = [context.Process(target=ask, args=(unix, seconds, ready, answered)) for _ in range(clients)]
    with contextlib.ExitStack() as ended:
        for asker in askers:
            asker.start()
            ended.callback(asker.join)
    return sum(answered.get() for _ in askers)


def ask(unix: str, seconds: float, ready: Barrier, answered: "multiprocessing.SimpleQueue[float]") -> None:
    """Ask without a pause, and say how many answers came per second."""
    image = np.zeros((1, 224, 224, 3), np.int8)
    with Client(unix) as client:
        client.infer("mobilenet_v2_int8", image)
        ready.wait()
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            client.infer("mobilenet_v2_int8", image)
            count += 1
        answered.put(count / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
