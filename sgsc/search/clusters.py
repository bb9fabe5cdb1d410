"""Exact k-means of numbers, by dynamic programming: no start to choose, the same answer every time.

Wang & Song, Ckmeans.1d.dp, The R Journal 3/2, 2011: sorted numbers fall into intervals, so that the best partition of
the first j into m clusters is the best one of the first i into m - 1, and one cluster of the rest, for some i.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def kmeans_1d(values: ArrayLike, clusters: int) -> NDArray[np.int64]:
    """(N,) finite numbers -> (N,) labels, 0 for the cluster of the least ones, that minimise the sum of squares.

    Equal numbers share a label, and there are never more clusters than different numbers. O(clusters N²), in memory N².

    Raises:
        ValueError: If there is no value, one is not finite, or `clusters` is below 1.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all():
        raise ValueError(f"values of shape {given.shape}: want at least one number, all finite, in one dimension")
    if clusters < 1:
        raise ValueError(f"clusters={clusters}: want at least 1")
    x, where, counts = np.unique(given, return_inverse=True, return_counts=True)
    x = x - x.mean()  # sums of squares would else cancel
    count = len(x)
    weight, first, second = (np.concatenate([[0.0], np.cumsum(counts * x**power)]) for power in (0, 1, 2))
    size, total, squares = (sums[None, :] - sums[:, None] for sums in (weight, first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(size > 0, np.maximum(squares - total**2 / size, 0), np.inf)  # [i, j]: x[i:j] as one cluster
    least, cuts = cost[0], []
    for _ in range(1, min(clusters, count)):
        through = least[:, None] + cost
        cuts.append(through.argmin(0))
        least = through[cuts[-1], np.arange(count + 1)]
    starts = [count]
    for cut in reversed(cuts):
        starts.append(int(cut[starts[-1]]))
    labels = np.zeros(count, dtype=np.int64)
    for start in starts[1:]:
        labels[start:] += 1
    return labels[where]
