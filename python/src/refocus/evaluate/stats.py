"""Confidence intervals: Wilson for shares of right answers, bootstrap over texts where several questions share one."""
from __future__ import annotations

import math
import random
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson(right: float, total: int, z: float = Z95) -> tuple[float, float]:
    """Of a share right / total (E. B. Wilson, 1927); also for sums of scores from 0 to 1: wide enough."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(max(0.0, share * (1 - share)) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def bootstrap(groups: Sequence[Sequence[float]], draws: int = 2000, seed: int = 1) -> tuple[float, float]:
    """95 % of the mean over all values, drawing whole groups: questions about one text are not independent."""
    if not groups:
        return 0.0, 1.0
    rng = random.Random(seed)
    sums = [(sum(group), len(group)) for group in groups]
    means = []
    for _ in range(draws):
        drawn = [sums[rng.randrange(len(sums))] for _ in sums]
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    return means[int(0.025 * (draws - 1))], means[math.ceil(0.975 * (draws - 1))]


def interval(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean and a 95 % interval: the wider of Wilson over all values and, from five texts, bootstrap over texts."""
    values = [value for group in groups for value in group]
    mean = sum(values) / len(values)
    low, high = wilson(sum(values), len(values))
    if len(groups) >= 5:
        drawn = bootstrap(groups)
        low, high = min(low, drawn[0]), max(high, drawn[1])
    return mean, min(low, mean), max(high, mean)


def paired(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of differences in -1..1 and a 95 % interval: gains and losses each by Wilson, put together by square and add
    (R. G. Newcombe, 1998), which does not take few equal pairs for certainty; and, where it is wider, bootstrap over
    texts from five on."""
    values = [value for group in groups for value in group]
    if not values:
        return 0.0, -1.0, 1.0
    gain, loss = (sum(max(0.0, sign * value) for value in values) for sign in (1, -1))
    (gain_low, gain_high), (loss_low, loss_high) = wilson(gain, len(values)), wilson(loss, len(values))
    gain, loss = gain / len(values), loss / len(values)
    mean = gain - loss
    low = mean - math.hypot(gain - gain_low, loss_high - loss)
    high = mean + math.hypot(gain_high - gain, loss - loss_low)
    if len(groups) >= 5:
        drawn = bootstrap(groups)
        low, high = min(low, drawn[0]), max(high, drawn[1])
    return mean, max(-1.0, low), min(1.0, high)


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
