"""Figures that people read, computed from counts: accuracy, precision, recall, F1, with n and interval.

Metrics are computed from merged counts at read time and never averaged. Where there is no support the answer is
None ("n/a"), never 0.
"""

import math
from collections.abc import Iterable

import msgspec

from protocol.statistics import ConfusionCell

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


class Proportion(msgspec.Struct, frozen=True, kw_only=True):
    """A share with its sample size and 95 % interval; ``value`` is None when n is 0."""

    successes: int
    n: int
    value: float | None
    low: float | None
    high: float | None


class ClassMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Precision, recall and F1 of one class; None where nothing supports the figure."""

    precision: float | None
    recall: float | None
    f1: float | None
    support: int  # how often this class was the truth


def proportion(successes: int, n: int) -> Proportion:
    """Return a share with its Wilson score interval (Wilson 1927, JASA 22:209), 95 %."""
    if n == 0:
        return Proportion(successes=0, n=0, value=None, low=None, high=None)
    p = successes / n
    centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
    return Proportion(successes=successes, n=n, value=p, low=max(0.0, centre - half), high=min(1.0, centre + half))


def accuracy(cells: Iterable[ConfusionCell]) -> Proportion:
    """Return the share of the diagonal of a sparse confusion matrix."""
    right = total = 0
    for true, predicted, n in cells:
        total += n
        right += n if true == predicted else 0
    return proportion(right, total)


def class_metrics(cells: Iterable[ConfusionCell], classes: int) -> tuple[ClassMetrics, ...]:
    """Return one-vs-rest precision, recall and F1 per class from a sparse confusion matrix.

    Class numbers come from clients' feedback: one that the model does not have is no class, but as the wrong one of
    a pair it still counts against the other.
    """
    hits, truths, predictions = [0] * classes, [0] * classes, [0] * classes
    for true, predicted, n in cells:
        if 0 <= true < classes:
            truths[true] += n
            hits[true] += n if true == predicted else 0
        if 0 <= predicted < classes:
            predictions[predicted] += n
    return tuple(_one_class(hits[k], predictions[k], truths[k]) for k in range(classes))


def macro_f1(cells: Iterable[ConfusionCell], classes: int) -> float | None:
    """Return the mean F1 over the classes that have support, or None when none has."""
    scores = [m.f1 for m in class_metrics(cells, classes) if m.support and m.f1 is not None]
    return sum(scores) / len(scores) if scores else None


def _one_class(hits: int, predicted: int, support: int) -> ClassMetrics:
    precision = hits / predicted if predicted else None
    recall = hits / support if support else None
    f1 = 2 * hits / (predicted + support) if predicted + support else None
    return ClassMetrics(precision=precision, recall=recall, f1=f1, support=support)
