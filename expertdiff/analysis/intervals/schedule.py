"""Intervals from the noise schedule alone (ANT, arXiv 2306.00354)."""

from expertdiff.analysis.intervals.base import Cells, Curve, IntervalMethod, Selection
from expertdiff.analysis.intervals.segments import possible, to_middle
from expertdiff.bundle import Bundle
from expertdiff.data.base import Data
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import NoiseProcess


class UniformLength(IntervalMethod):
    """Intervals of equal length, to a cell of the chain: least sum of abs(t - t in the middle)."""

    source = "ANT (arXiv 2306.00354), timestep-based"

    def __call__(
        self, k: int, process: NoiseProcess, data: Data, bundle: Bundle | None
    ) -> Selection:
        cells = Cells.of(process)
        n = len(cells.t)
        possible(n, k)
        # Any lengths that differ by a cell cost the same: here the longer ones are spread out.
        ends = [round(i * n / k) for i in range(k + 1)]
        cost = sum(map(to_middle(cells.t.double().numpy()), ends, ends[1:]))
        return Selection(self, Partition([cells.partition.edges[i] for i in ends]), (), cost)


class LogSNR(IntervalMethod):
    """Intervals in which log SNR changes alike: least sum of abs(log SNR - that in the middle)."""

    source = "ANT (arXiv 2306.00354), SNR-based, of the logarithm"

    def __call__(
        self, k: int, process: NoiseProcess, data: Data, bundle: Bundle | None
    ) -> Selection:
        cells = Cells.of(process)
        y = process.snr(cells.t).log().numpy()
        partition, cost = cells.cut(k, to_middle(y))
        curve = Curve("log SNR", "", cells.progress, y.tolist())
        return Selection(self, partition, (curve,), cost)
