"""Mixed experts, watched while they learn: who takes how much of which basis."""

from itertools import combinations

import torch
from lightning.pytorch import Callback, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from expertdiff.callbacks.monitor import drawing, picture_of_step
from expertdiff.experts.remixed import Remixed
from expertdiff.files import replacing
from expertdiff.look import INK, style
from expertdiff.methods.base import Method

NUMBERED = 50
"""Up to so many experts a picture has room for the coefficients as numbers."""


class MixingMap(Callback):
    """After each validation, a picture of the averaged weights' coefficients (figure 4).

    The loggers get how far the bases are apart, as `basis_similarity` has it. Nothing for a
    network that is not mixed.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Method) -> None:
        network = pl_module.network
        if not (drawing(trainer, pl_module) and isinstance(network, Remixed)):
            return
        figure = mixing_figure(network.coefficients().detach())
        with picture_of_step(trainer, "mixing", "mixing") as path, replacing(path) as temporary:
            figure.savefig(temporary, format="png")
        distance, cosine = basis_similarity(network)
        values = {"mixing/basis_distance": distance, "mixing/basis_cosine": cosine}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


@torch.no_grad()
def basis_similarity(network: Remixed) -> tuple[float, float]:
    """The means over all pairs of bases of |b - c| / sqrt(|b| |c|), and of their cosine.

    A basis is the vector of its mixed parameters. Where there is one alone, 0 and 1.
    """
    stacks = [stack.flatten(1) for stack in network.stacks().values()]
    squares = sum(stack.square().sum(1).double() for stack in stacks)
    pairs = list(combinations(range(len(squares)), 2))
    distances, cosines = [], []
    for k, other in pairs:
        scale = (squares[k] * squares[other]).sqrt()
        # Of differences, not from products, in which those of like bases would drown.
        apart = sum((stack[k] - stack[other]).square().sum().double() for stack in stacks)
        distances.append((apart / scale).sqrt())
        cosines.append((squares[k] + squares[other] - apart) / (2 * scale))
    if not pairs:
        return 0.0, 1.0
    return torch.stack(distances).mean().item(), torch.stack(cosines).mean().item()


def mixing_figure(coefficients: Tensor) -> Figure:
    """A table of coefficients [N, K], or [blocks, N, K] side by side; numbers are times 100."""
    tables = coefficients.cpu().reshape(-1, *coefficients.shape[-2:])
    blocks, n, k = tables.shape
    with style():
        size = (1 + blocks * (0.3 + 0.35 * k), 1 + min(0.22 * n, 12))
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        panels = figure.subplots(1, blocks, sharey=True, squeeze=False)[0]
        for block, (axes, table) in enumerate(zip(panels, tables.tolist())):
            axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="none")
            title = f"block {block}" if blocks > 1 else "coefficients x 100"
            axes.set(xticks=range(k), xlabel="basis", title=title)
            for i, row in enumerate(table) if n <= NUMBERED else ():
                for j, share in enumerate(row):
                    colour = "white" if share > 0.6 else INK
                    label = dict(ha="center", va="center", fontsize=7, color=colour)
                    axes.text(j, i, f"{100 * share:.0f}", **label)
        panels[0].set_ylabel("expert (0 = cleanest)")
        panels[0].yaxis.get_major_locator().set_params(integer=True)
        figure.draw_without_rendering()  # only now ticks are made and take their look
    return figure
