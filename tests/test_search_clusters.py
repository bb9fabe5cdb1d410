"""Exact 1-D k-means: against every partition, against scikit-learn, and at its edges."""

import itertools
import warnings

import numpy as np
import pytest
from sklearn.cluster import KMeans

from sgsc.search.clusters import kmeans_1d


def within(values, labels):
    return sum(((values[labels == k] - values[labels == k].mean()) ** 2).sum() for k in np.unique(labels))


@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_no_partition_into_intervals_is_better(clusters, seed):
    values = np.random.default_rng(seed).standard_cauchy(9)
    order = np.sort(values)
    best = min(
        sum(((part - part.mean()) ** 2).sum() for part in np.split(order, cut))
        for cut in itertools.combinations(range(1, 9), clusters - 1)
    )
    labels = kmeans_1d(values, clusters)
    assert within(values, labels) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert len(np.unique(labels)) == clusters


@pytest.mark.parametrize("seed", range(3))
def test_scikit_learn_finds_nothing_better(seed):
    values = np.random.default_rng(seed).lognormal(size=200)
    for clusters in range(2, 7):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = KMeans(clusters, n_init=20, random_state=0).fit(values[:, None])
        assert within(values, kmeans_1d(values, clusters)) <= theirs.inertia_ * (1 + 1e-9)


def test_labels_follow_the_values():
    assert kmeans_1d([5.0, 0.0, 5.1, 0.1, 9.9], 3).tolist() == [1, 0, 1, 0, 2]


def test_numbers_far_from_zero_lose_nothing():
    values = 1e9 + np.array([0.0, 1e-3, 1.0, 1.001])
    assert kmeans_1d(values, 2).tolist() == [0, 0, 1, 1]


def test_equal_numbers_share_a_label_and_make_no_clusters():
    assert kmeans_1d([2.0, 1.0, 2.0, 2.0], 4).tolist() == [1, 0, 1, 1]
    assert kmeans_1d([3.0] * 5, 3).tolist() == [0] * 5


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [1.0, float("inf")], [[1.0], [2.0]]])
def test_what_cannot_be_clustered_is_refused(bad):
    with pytest.raises(ValueError, match="want at least one number, all finite"):
        kmeans_1d(bad, 2)
    with pytest.raises(ValueError, match="clusters=0: want at least 1"):
        kmeans_1d([1.0], 0)
