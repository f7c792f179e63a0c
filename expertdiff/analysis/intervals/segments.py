"""The cheapest cut of a row of points into segments, by exact dynamic programming."""

from collections.abc import Callable

import numpy as np

Cost = Callable[[int, int], float]
"""Of the segment that holds the points i to j - 1."""


def cheapest(n: int, k: int, cost: Cost) -> tuple[list[int], float]:
    """The cut of the points 0 to n - 1 into `k` segments whose costs add up to the least.

    D[m, j] = min_i D[m-1, i] + cost(i, j), so n^2 / 2 costs and k n^2 additions; of equally good
    cuts, the one whose last segment is longest.

    Args:
        n: number of points.
        k: number of segments, none of them empty.
        cost: of a segment; infinite where it must not be, which some cut has to avoid.

    Returns:
        The k + 1 ends, from 0 to n: segment m holds the points ends[m] to ends[m+1] - 1; and the
        sum of the costs.

    Raises:
        ValueError: `n` points do not make `k` segments.
    """
    possible(n, k)
    costs = np.full((n, n + 1), np.inf)
    for i in range(n):
        costs[i, i + 1 :] = [cost(i, j) for j in range(i + 1, n + 1)]
    best, starts = costs[0], []
    for _ in range(k - 1):
        totals = best[:n, None] + costs
        starts.append(totals.argmin(0))
        best = totals.min(0)
    ends = [n]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return [0, *reversed(ends)], float(best[n])


def possible(n: int, k: int) -> None:
    """Raises a ValueError unless `n` points make `k` segments."""
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} intervals cannot be cut from {n} points: give a k from 1 to {n}")


def middle(i: int, j: int) -> int:
    """The middle of the points i to j - 1, the lower one of two."""
    return (i + j - 1) // 2


def to_middle(x: np.ndarray) -> Cost:
    """cost(i, j) = sum over the segment of abs(x - x at its middle), of x [n]."""
    return lambda i, j: float(np.abs(x[i:j] - x[middle(i, j)]).sum())
