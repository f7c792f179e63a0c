"""Verbs that take a configuration of ``fit``, as an argument parser cannot know all its options."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from expertdiff.analysis.intervals import IntervalMethod, Selection, every, select
from expertdiff.bundle import Bundle
from expertdiff.cluster import SCRIPTS
from expertdiff.evaluation.kinds import kind
from expertdiff.expert_cli import ConfigOnly, Parser, check_whole, classes_for
from expertdiff.files import read_json
from expertdiff.launch import Plan, launch, plan, submit
from expertdiff.methods.discrimination import Discrimination
from expertdiff.methods.mdm import MDM
from expertdiff.studies.trained import print_rows, write_rows


def launch_study(args: Sequence[str]) -> None:
    """Train every expert of a partition (and a baseline), stitch, test, report."""
    parser = parser_of(
        "launch",
        (
            "Trains every expert of a config's partition as its own process, and a single network "
            "of the same total cost beside them; stitches the experts into one model, tests both "
            "and writes a report. Run it again to continue: finished work is kept."
        ),
    )
    parser.add_argument(
        "--partition",
        type=Path,
        metavar="JSON",
        help="intervals, as `expertdiff intervals` writes them (default: those of the config)",
    )
    parser.add_argument(
        "--slurm",
        type=Path,
        nargs="?",
        const=SCRIPTS / "site.sh",
        metavar="SITE",
        help="submit the jobs to a SLURM cluster, whose settings are in this copy of slurm/site.sh",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="with --slurm: only print the commands"
    )
    ours, rest = parser.parse_known_args(args)
    if ours.dry_run and not ours.slurm:
        raise ValueError("--dry-run prints what --slurm would submit: give both")
    if ours.partition:
        rest += ["--model.partition.edges", str(edges_of(ours.partition))]
    cli = ConfigOnly([*layers(ours.config), *rest])
    own = cli.model.denoiser.partition
    if ours.partition and len(own) > 1 and own != cli.model.partition:
        raise ValueError(
            f"the network has intervals of its own, {own}, which --partition does not set: name "
            "them there (of MultiStage: --model.network.partition.edges)"
        )
    planned = plan_config(cli, ours.parallel)
    if ours.slurm:
        submit(planned, ours.slurm, ours.parallel, ours.dry_run)
    else:
        launch(planned, ours.parallel)


def plan_config(cli: ConfigOnly, parallel: int | None) -> Plan:
    """The study of this configuration."""
    if isinstance(cli.model, Discrimination):
        raise ValueError(
            "a discriminator draws nothing that a launch could judge: train it with expertdiff fit"
        )
    config = cli.resolved()
    for name in ("max_steps", "default_root_dir"):
        if config["trainer"][name] not in (-1, None):
            raise ValueError(
                f"--trainer.{name} cannot be the same for every job: set study.iterations, "
                "study.budget, study.root or study.name"
            )
    check_whole(config["trainer"])
    data, evaluation = cli.datamodule.identity(), cli.study.evaluation
    if evaluation:  # what a test would refuse is refused before the training
        evaluation.check(kind(data), "the model")
        evaluation.guided(cli.model.denoiser, data)
    return plan(cli.study, config, data, cli.model.job, parallel)


def layers(configs: Sequence[str]) -> list[str]:
    """The options that lay these files over each other."""
    return [part for path in configs for part in ("--config", path)]


def parser_of(verb: str, description: str) -> argparse.ArgumentParser:
    """Of a verb that takes a configuration and runs jobs."""
    parser = argparse.ArgumentParser(
        prog=f"expertdiff {verb}",
        description=description,
        epilog=(
            "All options of `expertdiff fit` lay over the configuration, for example --study.name, "
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
    return parser


def edges_of(path: Path) -> list[float]:
    """The edges in a file of `expertdiff intervals`."""
    content = read_json(path)
    if "edges" not in content:
        raise ValueError(
            f"{path} has no edges on top: choose one method with expertdiff intervals --method"
        )
    return content["edges"]


def intervals(args: Sequence[str]) -> None:
    """Choose where to cut the chain, by one method or by all."""
    parser = parser_of(
        "intervals",
        (
            "Chooses the intervals of a config's partition and writes intervals.json, which "
            "`expertdiff launch --partition` takes, and a picture of what they were chosen by. "
            "With several methods, or all that apply, they stand beside each other."
        ),
    )
    parser.add_argument(
        "--method",
        type=method_of,
        metavar="CLASS",
        help=f"how to choose: {', '.join(classes_for('method'))} (default: all that apply)",
    )
    parser.add_argument("--k", type=int, default=3, help="number of intervals (default: 3)")
    parser.add_argument("--bundle", type=Path, help="a trained model, for methods that look at one")
    parser.add_argument("--output", type=Path, help="folder (default: <study>/intervals)")
    parser.add_argument(
        "--train", type=int, metavar="STEPS",
        help="also launch a study of so many steps with each choice, and compare their distances",
    )  # fmt: skip
    ours, rest = parser.parse_known_args(args)
    cli = ConfigOnly([*layers(ours.config), *rest])
    if ours.train and not isinstance(cli.model, MDM):
        raise ValueError(
            f"--train compares experts that were trained on each choice, and "
            f"{type(cli.model).__name__} trains none: name a configuration of MDM"
        )
    output = ours.output or cli.study.folder / "intervals"
    bundle = Bundle.load(ours.bundle) if ours.bundle else None
    methods = [ours.method] if ours.method else every()
    found = select(methods, ours.k, cli.model.process, cli.datamodule, bundle, output)
    if ours.train:
        compare_choices(found, rest, ours, output)


def method_of(text: str) -> IntervalMethod:
    """The method of a class name, or of a whole ``{class_path: .., init_args: ..}``."""
    parser = Parser(prog="expertdiff intervals")
    parser.add_argument("--method", type=IntervalMethod)
    return parser.instantiate_classes(parser.parse_args([f"--method={text}"])).method


def compare_choices(
    found: Sequence[Selection], rest: list[str], ours: argparse.Namespace, output: Path
) -> None:
    """Launches a short study of equal budget with each choice; tells their distances."""
    clis = []
    for choice in found:
        options = {
            "model.partition.edges": list(choice.partition.edges),
            "study.root": output,
            "study.name": choice.name,
            "study.iterations": ours.train,
            "study.budget": "null",
            "study.baseline": choice is found[0],
        }
        laid = [f"--{name}={value}" for name, value in options.items()]
        clis.append(ConfigOnly([*layers(ours.config), *rest, *laid]))
        clis[-1].study.budgets(choice.partition)  # refused before any are trained
    for cli in clis:
        launch(plan_config(cli, ours.parallel), ours.parallel)
    folders = [cli.study.folder for cli in clis]
    tests = {"baseline": folders[0] / "tests/baseline"}
    tests |= {folder.name: folder / "tests/stitched" for folder in folders}
    rows = []
    for name, test in tests.items():
        told = read_json(test / "metrics.json")
        rows.append({"intervals": name, told["metric"]: told["mean"], "std": told["std"]})
    write_rows(rows, output / "trained.csv")
    print()
    print_rows(rows, list(rows[0]))
    print(f"table: {output / 'trained.csv'}")
