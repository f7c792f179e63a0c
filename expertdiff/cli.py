"""The front door: LightningCLI's fit, validate, test and predict, and the verbs around them."""

import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import get_args, get_origin

from lightning.fabric.utilities.exceptions import MisconfigurationException

from expertdiff.analysis.consistency import consistency
from expertdiff.analysis.merging import merge
from expertdiff.callbacks.checkpoint import Interrupted, handling, stop_at_once
from expertdiff.config_verbs import intervals, launch_study
from expertdiff.data.latents import latents
from expertdiff.evaluation.inception import COMPARABLE
from expertdiff.expert_cli import ExpertCLI, Parser
from expertdiff.files import Unusable, WriteFailed
from expertdiff.jobs import INTERRUPTED
from expertdiff.measure import measure
from expertdiff.status import status
from expertdiff.studies.combinations import combinations
from expertdiff.studies.compare import compare
from expertdiff.studies.convergence import convergence
from expertdiff.tables.dualdiff import table
from expertdiff.verbs import export, likelihood, quantize, report, sample, stitch

VERBS: dict[str, Callable[..., None]] = {
    verb.__name__: verb
    for verb in (
        stitch, merge, sample, measure, quantize, export, latents, likelihood, report, consistency,
        convergence, combinations, compare, table,
    )
}  # fmt: skip


PARSED: dict[str, Callable[[Sequence[str]], None]] = {
    "launch": launch_study,
    "intervals": intervals,
    "status": status,
}
"""Verbs with a parser of their own."""


def run_verb(function: Callable[..., None], args: Sequence[str]) -> None:
    """Calls a function with its first argument by position, the others as options."""
    (first, *_), summary = inspect.signature(function).parameters.items(), inspect.getdoc(function)
    parser = Parser(
        prog=f"expertdiff {function.__name__}",
        description=(summary or "").partition("\n")[0],
        epilog=COMPARABLE if function is measure else None,
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
  status    how the jobs of a study go: steps, speed, loss, time left, state in the queue
  fit       train one job: an expert, or a single network
  validate  losses by interval of a trained job
  test      draw images from a bundle and measure their distance from real ones
  predict   draw images from a bundle inside your own Lightning program
  stitch    make one model (a bundle) of trained experts
  merge     make one network of experts that were trained from one network
  sample    draw from a bundle: images (a PNG grid and an .npz) or points (a picture and a .csv)
  measure   compare a file of images with real ones, or with published statistics
  quantize  write a bundle once more with weights in int8, a quarter of its size
  export    write the experts of a bundle as plain networks, with the keys of ADM and DiT
  latents   encode images once with an autoencoder, for a latent model
  report    write the page of a study

  intervals     choose where to cut the chain: by the data, the schedule or a trained model
  convergence   when each expert of a study has converged
  combinations  where experts help, and where the baseline is better
  compare       distance against training cost, of one study or several
  consistency   whether two models make the same of the same noise, and which interval decides
  likelihood    bits a dimension of held-out data, by the probability flow
  table         compute a published table again, with its floors and controls

`expertdiff VERB --help` tells the options. Start with
  expertdiff launch --config configs/digits/mdm.yaml"""


CODES = {Unusable: 73, WriteFailed: 74, FloatingPointError: 70}
"""Exit codes of errors that are no bad input."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code.

    0 done; 2 bad input; 70 the training diverged; 73 the folder is in use or cannot be written;
    74 a later write failed; 75 interrupted with a checkpoint, to be resumed by the same command.
    """
    args = list(sys.argv[1:] if args is None else args)
    verb = args[0] if args else "--help"
    # Lightning's advertisements and notes on its defaults.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Of Lightning and jsonargparse about each other and torch; nothing a user could mend.
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*ddp_comm_hook.*",
        ".*`srun`.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    try:
        if verb == "fit":
            with handling(stop_at_once):
                ExpertCLI(args)
        elif verb in ExpertCLI.subcommands():
            ExpertCLI(args)
        elif verb in PARSED:
            PARSED[verb](args[1:])
        elif verb in VERBS:
            run_verb(VERBS[verb], args[1:])
        elif verb in ("-h", "--help"):
            print(HELP)
        else:
            raise ValueError(f"{verb!r} is no verb: `expertdiff --help` lists them")
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError, MisconfigurationException) as error:
        told = isinstance(error, (OSError, MisconfigurationException))
        said = error if told else _ours(error)
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
