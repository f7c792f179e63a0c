"""LightningCLI with what every run of ours has: averaged weights, exact checkpoints, a study."""

import inspect
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only

# The imports that look unused make the bare names of their classes known to the command line.
import expertdiff.callbacks.momentum
import expertdiff.data
import expertdiff.diffusion.guidance
import expertdiff.discriminator
import expertdiff.evaluation.cloud
import expertdiff.evaluation.inception
import expertdiff.experts.gated
import expertdiff.experts.multistage
import expertdiff.experts.remixed
import expertdiff.methods.adversarial
import expertdiff.methods.discrimination
import expertdiff.methods.distillation
import expertdiff.methods.dualdiff
import expertdiff.methods.indm
import expertdiff.methods.mdm
import expertdiff.methods.remix
import expertdiff.methods.single
import expertdiff.methods.uncertainty
import expertdiff.networks.ddpmpp
import expertdiff.networks.dit
import expertdiff.networks.encoder
import expertdiff.networks.flow
import expertdiff.networks.mlp
import expertdiff.networks.unet  # noqa: F401
from expertdiff import checkpoints
from expertdiff.analysis.intervals import IntervalMethod
from expertdiff.callbacks.checkpoint import ExactCheckpoint, Interrupted, handling
from expertdiff.callbacks.ema import EMA
from expertdiff.callbacks.gates import GateMap
from expertdiff.callbacks.losses import LossByExpert
from expertdiff.callbacks.mixing import MixingMap
from expertdiff.callbacks.monitor import DenoisingGrid, LossByInterval, ResolvedConfig
from expertdiff.data.base import Data
from expertdiff.describe import Described
from expertdiff.devices import accelerator
from expertdiff.evaluation.inception import COMPARABLE
from expertdiff.files import locked, read_json, writable
from expertdiff.loggers import StudyLogger
from expertdiff.methods.base import Method
from expertdiff.report.study import SHARED
from expertdiff.study import Study


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, without the usage of a hundred options above it."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        key, value = UNKNOWN.search(message).groups() if UNKNOWN.search(message) else ("", "")
        if names := classes_for(key.rpartition(".")[2]):
            message = f"{value} is no {key}: choose from {', '.join(names)}, or name a class"
        sys.stderr.write(f"expertdiff: error: {' '.join(message.split())}\n")
        raise SystemExit(2)


STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
WHOLE = (DDPStrategy, SingleDeviceStrategy)
"""Strategies under which each rank has the whole model."""

UNKNOWN = re.compile(r'Parser key "([^"]+)".*Expected a dot import path string: (\S+)', re.DOTALL)
"""What jsonargparse says of a class that it does not find."""


def classes_for(argument: str) -> list[str]:
    """Bare names of the classes that the argument of this name takes in one of our classes."""
    kinds = [{"model": Method, "data": Data, "method": IntervalMethod}.get(argument)]
    for owner in (Method, Study, *_subclasses(Described)):
        if parameter := inspect.signature(owner.__init__).parameters.get(argument):
            kinds += [parameter.annotation, *get_args(parameter.annotation)]
    for kind in kinds:
        if isinstance(kind, type) and (issubclass(kind, Described) or kind is Method):
            found = _subclasses(kind) | {kind}
            return sorted(cls.__name__ for cls in found if not inspect.isabstract(cls))
    return []


def check_whole(trainer: Mapping[str, Any]) -> None:
    """Raises a ValueError for a trainer that would judge a model by a part of its samples."""
    limit = trainer["limit_test_batches"]  # 1.0 is all, 1 is one batch
    if trainer["fast_dev_run"] or isinstance(limit, int) or limit not in (None, 1.0):
        raise ValueError(
            "a part of the samples is no test: leave trainer.fast_dev_run and limit_test_batches "
            "out, and set how many samples the evaluation draws"
        )


def _subclasses(cls: type) -> set[type]:
    direct = set(cls.__subclasses__())
    return direct.union(*map(_subclasses, direct))


class ExpertCLI(LightningCLI):
    """LightningCLI with averaged weights, exact checkpoints and a study around every run."""

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        verbs: dict[str, Any] = {verb: {"allow_abbrev": False} for verb in self.subcommands()}
        verbs["test"]["epilog"] = COMPARABLE
        super().__init__(
            model_class=LightningModule,
            subclass_mode_model=True,
            datamodule_class=Data,
            subclass_mode_data=True,
            save_config_callback=ResolvedConfig,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False, "prog": "expertdiff", **verbs},
            trainer_defaults={
                "max_epochs": -1,  # one endless epoch, ended by max_steps
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,  # the data layer splits batches over ranks
                "check_val_every_n_epoch": None,  # val_check_interval counts steps
                "val_check_interval": 1000,
                "log_every_n_steps": 50,
                "logger": [{"class_path": "JsonLines"}, {"class_path": "WandB"}],
                "callbacks": [
                    LossByInterval(),
                    DenoisingGrid(),
                    GateMap(),
                    MixingMap(),
                    LossByExpert(),
                ],
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(ExactCheckpoint, "checkpoint")
        parser.add_class_arguments(Study, "study")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        arguments = config.model.init_args
        if "seed" in arguments:
            arguments.seed = int(config.seed_everything)
        study = config.study
        starts = "expert" in arguments and "init_from" in arguments
        if starts and study.shared and arguments.init_from is None:
            arguments.init_from = Path(study.root) / study.name / SHARED
            if not (arguments.init_from / "done.json").is_file():
                raise ValueError(
                    f"{arguments.init_from}, which study.shared says that experts start from, is "
                    "not trained: run expertdiff launch, which does, or fit --model Shared before"
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with what only the study and the job together know."""
        config = self.config_init[self.subcommand]
        trainer, study = config.trainer, config.study
        if isinstance(self.model, Method):
            if self.subcommand in ("test", "predict"):
                raise ValueError(
                    f"{type(self.model).__name__} is trained, and its bundle is tested: run "
                    "expertdiff launch, or stitch a job and name its bundle with --model Stitched"
                )
            job, folder = self.model.job, study.folder / self.model.job
            if trainer.max_steps == -1:
                kwargs["max_steps"] = steps = study.steps(self.model)
                if isinstance(trainer.val_check_interval, int):
                    # Lightning counts micro-batches; a job too short is validated at its end.
                    every = min(trainer.val_check_interval, steps)
                    kwargs["val_check_interval"] = every * trainer.accumulate_grad_batches
        else:
            job, folder = f"test-{self.model.output.name}", self.model.output
            if self.subcommand == "test":
                check_whole(trainer)
        folder = Path(trainer.default_root_dir or folder)
        kwargs["default_root_dir"] = str(folder)
        if trainer.accelerator == "auto":
            kwargs["accelerator"] = accelerator()
        if self.subcommand != "validate":
            writable(folder)
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            if isinstance(logger, StudyLogger):
                logger.attach(folder, study.name, job)
        if self.subcommand == "validate":  # its numbers are no part of the training's
            kwargs["logger"] = False
        if trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision {trainer.precision} is too coarse to train or average: "
                "use bf16-mixed"
            )
        strategy = trainer.strategy
        if strategy not in STRATEGIES and not isinstance(strategy, WHOLE):
            name = strategy if isinstance(strategy, str) else type(strategy).__name__
            raise ValueError(
                f"trainer.strategy {name} splits or copies a model in ways that averages and exact "
                "checkpoints do not know: use ddp on several devices, auto on one"
            )
        if SLURMEnvironment.detect():
            # Lightning's requeueing saves in the middle of a step and mixes up experts.
            kwargs["plugins"] = [*(trainer.plugins or []), SLURMEnvironment(auto_requeue=False)]
        return super().instantiate_trainer(**kwargs)

    def fit(self, model: Method, datamodule: Data, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Trains to `max_steps`, from the newest checkpoint of this job if there is one."""
        if not isinstance(model, Method):
            raise ValueError(f"{type(model).__name__} cannot be trained: name a method, as MDM")
        folder = Path(self.trainer.default_root_dir)
        for foreign in folder.glob("hpc_ckpt_*"):
            raise ValueError(
                f"{foreign} was written by Lightning's own requeueing, which resumes from it "
                "whatever it holds: move it away"
            )
        keeper = next(c for c in self.trainer.callbacks if isinstance(c, ExactCheckpoint))
        # One lock a run: further ranks of it are other processes.
        first = not getattr(rank_zero_only, "rank", 0)
        with locked(folder) if first else nullcontext(), handling(keeper.on_signal):
            # Also for a run that was finished before: the checkpoint says whether it is this run.
            ckpt_path = ckpt_path or checkpoints.newest(folder / "checkpoints")
            try:
                self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, **kwargs)
            except (RuntimeError, ValueError, OSError) as error:
                self._end_ranks(error)
                raise
            step, last = self.trainer.global_step, self.trainer.max_steps
            if step < last:
                raise Interrupted(f"stopped at step {step} of {last}")
            done = folder / "done.json"
            if not done.is_file() or read_json(done)["step"] != step:
                keeper.record(self.trainer)  # a kill had come between checkpoint and record
        if self.trainer.is_global_zero:
            print(f"{model.job} is trained: {folder}")

    def _end_ranks(self, error: Exception) -> None:
        """What fails on one rank leaves no other waiting for it."""
        trainer = self.trainer
        if trainer.world_size > 1:
            print(
                f"rank {trainer.global_rank} of {trainer.world_size} of {trainer.default_root_dir} "
                f"ends at step {trainer.global_step}: {str(error).partition(chr(10))[0]}",
                file=sys.stderr,
            )
            trainer.strategy.launcher.kill(signal.SIGKILL)

    def validate(
        self, model: Method, datamodule: Data, ckpt_path: Any = None, **kwargs: Any
    ) -> None:
        """Prints the losses by interval of this job's newest checkpoint (averaged weights)."""
        folder = Path(self.trainer.default_root_dir) / "checkpoints"
        ckpt_path = ckpt_path or checkpoints.newest(folder)
        if ckpt_path is None:
            raise ValueError(f"{folder} holds no checkpoint to validate: train it, or name one")
        print(f"{ckpt_path}:")
        self.trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, **kwargs)


class ConfigOnly(ExpertCLI):
    """Parses and checks the options of ``fit`` without training."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, run=False)

    def before_instantiate_classes(self) -> None:
        """Nothing will be trained here."""

    def instantiate_classes(self) -> None:
        """All but the trainer: whatever a job would refuse is refused before any starts."""
        objects = self.parser.instantiate_classes(self.config)
        if not isinstance(objects.model, Method):
            raise ValueError(
                f"{type(objects.model).__name__} trains nothing: name a configuration of fit"
            )
        self.study: Study = objects.study
        self.datamodule: Data = objects.data
        self.model: Method = objects.model

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain data."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config.pop("config", None)
        return config
