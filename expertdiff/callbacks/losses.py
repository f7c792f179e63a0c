"""Experts at home and away, when their model is tested."""

from lightning.pytorch import Callback, Trainer

from expertdiff.analysis.losses import expert_losses, losses_figure
from expertdiff.files import replacing, write_json
from expertdiff.loggers import log_picture
from expertdiff.methods.stitched import Stitched


class LossByExpert(Callback):
    """After a test, the loss of each expert on each interval: ``losses.json`` and ``losses.png``.

    On what is validated, or as many items of it as a picture shows. Nothing for a model of one
    expert.
    """

    def on_test_end(self, trainer: Trainer, pl_module: Stitched) -> None:
        model, data = pl_module.bundle.denoiser, trainer.datamodule
        if len(model.partition) == 1 or not trainer.is_global_zero:
            return
        n = min(pl_module.kind.shown, data.validation_samples)
        items, labels = (part[:n] for part in data.split("validation"))
        x0 = data.scaled(items.to(pl_module.device))
        y = labels.to(pl_module.device) if pl_module.bundle.num_classes else None
        with trainer.precision_plugin.forward_context():
            record = expert_losses(model, x0, y)
        write_json(pl_module.output / "losses.json", record)
        path = pl_module.output / "losses.png"
        with replacing(path) as temporary:
            losses_figure(record).savefig(temporary, format="png")
        log_picture(trainer.loggers, "losses", path)
