"""The front door: LightningCLI's fit, validate, test and predict, and the verbs around them."""

import argparse
import inspect
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

# The imports that look unused make the bare names of their classes known to the command line.
import expertdiff.data
import expertdiff.evaluation.cloud
import expertdiff.evaluation.features
import expertdiff.experts.gated
import expertdiff.methods.dualdiff
import expertdiff.methods.mdm
import expertdiff.methods.single
import expertdiff.networks.mlp
import expertdiff.networks.unet  # noqa: F401
from expertdiff import checkpoints
from expertdiff.callbacks.checkpoint import ExactCheckpoint, Interrupted
from expertdiff.callbacks.ema import EMA
from expertdiff.callbacks.gates import GateMap
from expertdiff.callbacks.monitor import DenoisingGrid, LossByInterval, ResolvedConfig
from expertdiff.data.base import Data
from expertdiff.describe import Described
from expertdiff.files import locked, read_json
from expertdiff.launch import INTERRUPTED, launch
from expertdiff.loggers import StudyLogger
from expertdiff.methods.base import Method
from expertdiff.study import Study
from expertdiff.tables.dualdiff import table
from expertdiff.verbs import report, sample, stitch


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, without the usage of a hundred options above it."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        key, value = UNKNOWN.search(message).groups() if UNKNOWN.search(message) else ("", "")
        if names := classes_for(key.rpartition(".")[2]):
            message = f"{value} is no {key}: choose from {', '.join(names)}, or name a class"
        sys.stderr.write(f"expertdiff: error: {' '.join(message.split())}\n")
        raise SystemExit(2)


UNKNOWN = re.compile(r'Parser key "([^"]+)".*Expected a dot import path string: (\S+)', re.DOTALL)
"""What jsonargparse says of a class that it does not find."""


def classes_for(argument: str) -> list[str]:
    """Bare names of the classes that the argument of this name takes in one of our classes."""
    kinds = [{"model": Method, "data": Data}.get(argument)]
    for owner in (Method, *_subclasses(Described)):
        if parameter := inspect.signature(owner.__init__).parameters.get(argument):
            kinds += [parameter.annotation, *get_args(parameter.annotation)]
    for kind in kinds:
        if isinstance(kind, type) and (issubclass(kind, Described) or kind is Method):
            found = _subclasses(kind) | {kind}
            return sorted(cls.__name__ for cls in found if not inspect.isabstract(cls))
    return []


def _subclasses(cls: type) -> set[type]:
    direct = set(cls.__subclasses__())
    return direct.union(*map(_subclasses, direct))


class ExpertCLI(LightningCLI):
    """LightningCLI with averaged weights, exact checkpoints and a study around every run."""

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        verbs = {verb: {"allow_abbrev": False} for verb in self.subcommands()}
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
                "callbacks": [LossByInterval(), DenoisingGrid(), GateMap()],
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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with what only the study and the job together know."""
        config = self.config_init[self.subcommand]
        trainer, study = config.trainer, config.study
        if isinstance(self.model, Method):
            job, folder = self.model.job, study.folder / self.model.job
            if trainer.max_steps == -1:
                kwargs["max_steps"] = steps = study.steps(self.model)
                if isinstance(trainer.val_check_interval, int):
                    # Lightning counts micro-batches; a job too short is validated at its end.
                    every = min(trainer.val_check_interval, steps)
                    kwargs["val_check_interval"] = every * trainer.accumulate_grad_batches
        else:
            job, folder = f"test-{self.model.output.name}", self.model.output
        folder = Path(trainer.default_root_dir or folder)
        kwargs["default_root_dir"] = str(folder)
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
        if SLURMEnvironment.detect():
            # Lightning's requeueing saves in the middle of a step and mixes up experts.
            kwargs["plugins"] = [*(trainer.plugins or []), SLURMEnvironment(auto_requeue=False)]
        return super().instantiate_trainer(**kwargs)

    def fit(self, model: Method, datamodule: Data, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Trains to `max_steps`, from the newest checkpoint of this job if there is one."""
        if not isinstance(model, Method):
            raise ValueError(f"{type(model).__name__} cannot be trained: name a method, as MDM")
        folder = Path(self.trainer.default_root_dir)
        keeper = next(c for c in self.trainer.callbacks if isinstance(c, ExactCheckpoint))
        # One lock a run: further ranks of it are other processes.
        first = not getattr(rank_zero_only, "rank", 0)
        with locked(folder) if first else nullcontext(), keeper.listening():
            # Also for a run that was finished before: the checkpoint says whether it is this run.
            ckpt_path = ckpt_path or checkpoints.newest(folder / "checkpoints")
            with suppress(SystemExit):  # Lightning's answer to a SIGTERM before the first step
                self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, **kwargs)
            step, last = self.trainer.global_step, self.trainer.max_steps
            if step < last:
                raise Interrupted(f"stopped at step {step} of {last}")
            done = folder / "done.json"
            if not done.is_file() or read_json(done)["step"] != step:
                keeper.record(self.trainer)  # a kill had come between checkpoint and record
        if self.trainer.is_global_zero:
            print(f"{model.job} is trained: {folder}")

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
        self.study: Study = objects.study
        self.datamodule: Data = objects.data
        self.model: Method = objects.model

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain data."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config.pop("config", None)
        return config


def launch_verb(args: Sequence[str]) -> None:
    """Train every expert of a partition (and a baseline), stitch, test, report."""
    parser = argparse.ArgumentParser(
        prog="expertdiff launch",
        description=(
            "Trains every expert of a config's partition as its own process, and a single network "
            "of the same total cost beside them; stitches the experts into one model, tests both "
            "and writes a report. Run it again to continue: finished work is kept."
        ),
        epilog=(
            "All options of `expertdiff fit` apply to every job, for example --study.name, "
            "--study.iterations, --seed_everything, --trainer.accelerator "
            "(see `expertdiff fit --help`)."
        ),
    )
    parser.add_argument(
        "--config",
        "-c",
        action="append",
        required=True,
        metavar="YAML",
        help="configuration; several are laid over each other",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="jobs at a time (default: one a GPU, or one a CPU core)",
    )
    ours, rest = parser.parse_known_args(args)
    configs = [part for path in ours.config for part in ("--config", path)]
    cli = ConfigOnly([*configs, *rest])
    config = cli.resolved()
    for name in ("max_steps", "default_root_dir"):
        if config["trainer"][name] not in (-1, None):
            raise ValueError(
                f"--trainer.{name} cannot be the same for every job: set study.iterations, "
                "study.budget, study.root or study.name"
            )
    launch(cli.study, config, cli.datamodule.identity(), cli.model.job, ours.parallel)


VERBS: dict[str, Callable[..., None]] = {
    "stitch": stitch,
    "sample": sample,
    "report": report,
    "table": table,
}


def run_verb(function: Callable[..., None], args: Sequence[str]) -> None:
    """Calls a function with its first argument by position, the others as options."""
    (first, *_), summary = inspect.signature(function).parameters.items(), inspect.getdoc(function)
    parser = Parser(
        prog=f"expertdiff {function.__name__}", description=(summary or "").partition("\n")[0]
    )
    name, parameter = first
    several = get_origin(parameter.annotation) is list
    (kind,) = get_args(parameter.annotation) if several else (parameter.annotation,)
    parser.add_argument(name, type=kind, **({"nargs": "+"} if several else {}))
    parser.add_function_arguments(function, skip={name})
    config = parser.instantiate_classes(parser.parse_args(args))
    function(**vars(config))


HELP = """usage: expertdiff VERB [options]

Trains, stitches, compares and samples multi-expert diffusion models.

  launch    train every expert of a config (and a baseline), stitch, test, report
  fit       train one job: an expert, or a single network
  validate  losses by interval of a trained job
  test      draw images from a bundle and measure their distance from real ones
  predict   draw images from a bundle inside your own Lightning program
  stitch    make one model (a bundle) of trained experts
  sample    draw from a bundle: images (a PNG grid and an .npz) or points (a picture and a .csv)
  report    write the page of a study
  table     compute a published table again, with its floors and controls

`expertdiff VERB --help` tells the options. Start with
  expertdiff launch --config configs/digits/mdm.yaml"""


CODES = {BlockingIOError: 73, FloatingPointError: 70}
"""Exit codes of errors that are no bad input: a folder in use, a training that diverged."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code.

    0 done; 2 bad input; 70 the training diverged; 73 another job holds the folder; 75 interrupted
    with a checkpoint, to be resumed by the same command.
    """
    args = list(sys.argv[1:] if args is None else args)
    verb = args[0] if args else "--help"
    # Lightning's advertisements and notes on its defaults.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Of Lightning and jsonargparse about each other and torch; nothing a user could mend.
    for message in (".*LeafSpec.*", ".*does not have many workers.*", ".*ddp_comm_hook.*"):
        warnings.filterwarnings("ignore", message=message)
    try:
        if verb in ExpertCLI.subcommands():
            ExpertCLI(args)
        elif verb == "launch":
            launch_verb(args[1:])
        elif verb in VERBS:
            run_verb(VERBS[verb], args[1:])
        elif verb in ("-h", "--help"):
            print(HELP)
        else:
            raise ValueError(f"{verb!r} is no verb: `expertdiff --help` lists them")
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        said = error if isinstance(error, OSError) else _ours(error)
        if said is None or os.environ.get("EXPERTDIFF_DEBUG"):
            raise
        print(f"expertdiff: error: {said}", file=sys.stderr)
        return next((code for kind, code in CODES.items() if isinstance(said, kind)), 2)
    return 0


def _ours(error: BaseException | None) -> BaseException | None:
    """The error that this package raised, so that its message is for the user.

    It may be the cause of one of jsonargparse's. ``None`` is a defect: the traceback is shown.
    """
    while error is not None:
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        if last.f_globals["__name__"].startswith("expertdiff."):
            return error
        error = error.__cause__
    return None
