"""A soft gate, watched while it learns."""

from lightning.pytorch import Callback, Trainer

from expertdiff.analysis.gates import gate_figure
from expertdiff.callbacks.monitor import POINTS, drawing, picture_of_step
from expertdiff.experts.gated import GatedExperts
from expertdiff.files import replacing
from expertdiff.methods.base import Method


class GateMap(Callback):
    """After each validation, a picture of the averaged weights' gate on 2,000 validation points.

    Nothing for a network without a gate, or for several seeds side by side.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Method) -> None:
        network, data = pl_module.network, trainer.datamodule
        if not (drawing(trainer, pl_module) and isinstance(network, GatedExperts)):
            return
        points, _ = data.split("validation")
        x0 = data.scaled(points[:POINTS].to(pl_module.device))
        figure = gate_figure(network, pl_module.process, x0)
        with picture_of_step(trainer, "gates", "gate") as path, replacing(path) as temporary:
            figure.savefig(temporary, format="png")
