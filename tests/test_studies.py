"""Questions to a trained study: convergence, combinations, cost; and budgets decided in rounds."""

import csv
import json
import shutil
from statistics import mean
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, TINY
from PIL import Image

from expertdiff.analysis.cost import Estimate, History, Point, Rule, account
from expertdiff.bundle import Expert
from expertdiff.callbacks.monitor import LossByInterval
from expertdiff.cli import main
from expertdiff.config_verbs import edges_of
from expertdiff.diffusion.partition import Interval
from expertdiff.files import read_json, write_text
from expertdiff.report.figures import ratio_figure
from expertdiff.report.study import Job, Study
from expertdiff.studies.compare import Curve, milestone_rows, names_of
from expertdiff.studies.trained import Trained

PLANE = ["--config", str(ROOT / "configs/toys/mdm.yaml")]
SMALL = [
    "--study.iterations=60", "--model.network.width=16", "--data.batch_size=32",
    "--trainer.log_every_n_steps=10", "--trainer.val_check_interval=20",
    "--study.evaluation.samples=60", "--study.evaluation.seeds=[0,1]",
    "--study.evaluation.judge.k=3", "--data.samples=300", "--data.validation_samples=64",
    "--trainer.logger=JsonLines",
    "--trainer.accelerator=cpu", "--checkpoint.every_n_steps=10", "--checkpoint.keep=null",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def jobs_in_this_process():
    """`test_launch` starts processes; here a job is a call, and draws no pictures: that is fast."""

    def run(jobs, parallel=None):
        for job in jobs:
            write_text(job.folder / "job.yaml", yaml.safe_dump(job.config, sort_keys=False))
            assert main(job.command[1:]) == 0

    with pytest.MonkeyPatch.context() as patch:
        for room in ("jobs", "launch"):
            patch.setattr(f"expertdiff.{room}.run", run)
        patch.setattr("expertdiff.callbacks.monitor.drawing", lambda *args: False)
        yield


def launched(root, name, *options):
    return main(
        ["launch", *PLANE, *SMALL, f"--study.root={root}", f"--study.name={name}", *options]
    )


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    """The folder of a tiny study of three experts on the plane, all checkpoints kept."""
    root = tmp_path_factory.mktemp("plane")
    assert launched(root, "three") == 0
    return root / "three"


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_convergence(plane, capsys):
    assert main(["convergence", str(plane)]) == 0
    rows = rows_of(plane / "convergence/table.csv")
    budgets = [Expert.read(plane / f"expert-{i}").step for i in range(3)]
    for i, budget in enumerate(budgets):
        steps = [int(row["step"]) for row in rows if row["expert"] == str(i)]
        assert steps == sorted({*range(10, budget, 10), budget})
    ends = {row["KL"] for row in rows if int(row["step"]) == budgets[int(row["expert"])]}
    assert len(ends) == 1  # with all experts finished it is the same model
    assert sum("best" in row["milestone"] for row in rows) == 3
    with Image.open(plane / "convergence/figure.png") as picture:
        assert min(picture.size) > 400
    told = capsys.readouterr().out
    assert "expert" in told and str(plane / "convergence/table.csv") in told


def test_combinations(plane):
    assert main(["combinations", str(plane)]) == 0
    rows = rows_of(plane / "combinations.csv")
    assert len(rows) == 8 and len({row["KL"] for row in rows}) == 8
    assert rows[0]["model"] == "baseline" and rows[0]["against baseline"] == "+0.0 %"
    assert float(rows[0]["KL"]) == pytest.approx(
        read_json(plane / "tests/baseline/metrics.json")["mean"]
    )
    assert float(rows[1]["KL"]) == pytest.approx(
        read_json(plane / "tests/stitched/metrics.json")["mean"]
    )


def test_compare(plane, tmp_path, capsys):
    assert (
        launched(tmp_path, "two", "--model.partition.edges=[0,0.5,1]", "--study.baseline=false")
        == 0
    )
    assert main(["compare", str(plane), str(tmp_path / "two"), f"--output={tmp_path}/out"]) == 0
    rows = rows_of(tmp_path / "out/table.csv")
    last = {row["model"]: row for row in rows}
    assert list(last) == ["three baseline", "three experts", "two experts"]
    assert {float(row["NTC"]) for row in last.values()} == {100.0}
    longest = max(Expert.read(plane / f"expert-{i}").step for i in range(3))
    found = [float(row["NWCT"]) for row in last.values()]
    assert found == pytest.approx([100, 100 * longest / 60, 50])
    # A short expert that has reached its budget costs no more while the others go on.
    mine = [row for row in rows if row["model"] == "three experts"]
    assert float(mine[0]["NTC"]) < 100 and [float(r["NTC"]) for r in mine] == sorted(
        float(r["NTC"]) for r in mine
    )
    milestones = rows_of(tmp_path / "out/milestones.csv")
    assert {row["milestone"] for row in milestones} == {"converged", "best", "equivalent"}
    assert (tmp_path / "out/figure.png").is_file()
    assert "converged means changes below 0.1" in capsys.readouterr().out


REMIX = [
    "--config", str(ROOT / "configs/toys/remix.yaml"),
    "--config", str(ROOT / "tests/conf/toy.yaml"),
    "--model.network.experts=4", "--model.network.bases=2", "--model.network.network.width=16",
    "--checkpoint.keep=null",
]  # fmt: skip


def test_mixed_experts_are_a_model_of_the_whole_chain(plane, tmp_path):
    """Their test tells each expert's loss, the report shows it, `compare` has their curve."""
    root = ["--study.root", str(tmp_path)]
    assert main(["launch", *REMIX, *root, "--study.name=remix"]) == 0
    record = read_json(tmp_path / "remix/tests/remix/losses.json")
    assert len(record["mse"]) == 4 and record["items"] == 40
    with Image.open(tmp_path / "remix/tests/remix/losses.png") as picture:
        assert min(picture.size) > 150
    page = (tmp_path / "remix/report.html").read_text()
    assert "Loss by expert" in page and "coefficients of each expert" in page
    assert "distance and cosine of the bases" in page
    studies = [str(plane), str(tmp_path / "remix")]
    assert main(["compare", *studies, f"--output={tmp_path}/out"]) == 0
    rows = [row for row in rows_of(tmp_path / "out/table.csv") if row["model"] == "remix remix"]
    assert [row["iterations"] for row in rows] == ["4", "8", "12"]
    assert [float(row["NTC"]) for row in rows] == pytest.approx([100 * n / 60 for n in (4, 8, 12)])


def test_an_estimate_is_the_better_the_nearer_to_real_data(plane):
    told = read_json(plane / "tests/stitched/metrics.json")
    scores = Trained.open(plane).judged({"KL": told["values"]})
    nearness = [abs(value - told["floor"]) for value in told["values"]]
    assert list(scores) == ["|KL - real data's|", "KL"]
    assert scores["|KL - real data's|"] == pytest.approx(nearness)
    assert main(["combinations", str(plane)]) == 0
    row = rows_of(plane / "combinations.csv")[1]
    assert float(row["|KL - real data's|"]) == pytest.approx(mean(nearness))


def test_checkpoints_of_an_interruption_are_no_points_of_a_curve(plane, tmp_path):
    copy = shutil.copytree(plane, tmp_path / "interrupted")
    folder = copy / "expert-2/checkpoints"
    for name in ("step-00000020.ckpt", "step-00000020.ckpt.json"):
        shutil.copy(folder / name, folder / name.replace("20", "13"))
    trained = Trained.open(copy)
    assert list(trained.kept(trained.experts[2])) == [10, 20, 24]


def test_a_point_that_is_converged_and_best_is_called_both(plane, monkeypatch):
    monkeypatch.setattr("expertdiff.studies.convergence.best", lambda values: 1)
    rule = ["--rule.change=1e9", "--rule.gap=1e9", "--rule.changes=1"]
    assert main(["convergence", str(plane), *rule]) == 0
    told = [row["milestone"] for row in rows_of(plane / "convergence/table.csv")]
    assert told.count("converged, best") == 3 and len(set(told)) == 2


def test_names_are_the_shortest_that_tell_studies_apart(tmp_path):
    assert names_of([tmp_path / "a/x", tmp_path / "b/y"]) == ["x", "y"]
    assert names_of([tmp_path / "a/x", tmp_path / "b/x"]) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="name each once"):
        names_of([tmp_path / "x", tmp_path / "a/../x"])


def test_the_loss_ratio_is_that_of_equal_steps():
    def job(name, losses):
        history = [{"step": step, "val/mse/0": loss} for step, loss in losses.items()]
        return Job(name, Interval(0, 1), 80, history, None)

    ours = {10 * k: float(k) for k in range(1, 8)} | {75: 99.0}  # the baseline has no step 75
    theirs = {10 * k: 2.0 for k in range(1, 9)}
    jobs = {"expert-0": job("expert-0", ours), "baseline": job("baseline", theirs)}
    (axes,) = ratio_figure(Study({"partition": [0, 1]}, jobs, {})).axes
    line, band = axes.lines[1], axes.collections[0].get_paths()[0].vertices
    assert line.get_xdata().tolist() == [30, 40, 50]
    assert line.get_ydata().tolist() == [1.5, 2.0, 2.5]
    assert {0.5, 1.5, 2.5, 3.5} <= {*band[:, 1]} and 99 / 2 not in band[:, 1]
    del jobs["baseline"]
    assert ratio_figure(Study({"partition": [0, 1]}, jobs, {})) is None


def test_devices_count_in_the_table_as_in_the_milestones():
    base = History([Point([100], [2.0], [100.0])])
    ours = History([Point([50, 50], [1.0], [30.0, 20.0])], devices=4)
    (row,) = Curve("ours", "FD", ours, [{"FD": 1.0}]).rows(base, "seconds")
    best = account(base, ours, Rule(), "seconds").model["best"]
    assert (row["NTC"], row["NWCT"]) == (best.ntc.value, best.nwct.value) == (200, 30)


def test_a_milestone_says_how_often_it_was_found():
    # Seed 0 alone reaches the target, seed 1 alone never, both together at the last point.
    base = History([Point([100], [2.0, 2.0])])
    curves = [(3.0, 3.0), (1.0, 3.1), (1.0, 2.9), (1.0, 2.9)]
    model = History([Point([10 * (i + 1)], pair) for i, pair in enumerate(curves)])
    found = account(base, model, Rule(), "iterations")
    row = milestone_rows("ours", found)[-1]
    share = f", found in {100 * found.speed_up.found:.3g} %"
    assert row["NTC"] == f"30 (20 to 30){share}" and row["speed-up"].endswith(share)
    assert milestone_rows("ours", found)[0]["NTC"] is None
    assert 0.7 < found.speed_up.found < 0.8 and found.model["converged"].ntc == Estimate(
        None, None, None, 0.0
    )


class TestRefuses:
    def refused(self, capsys, *args):
        assert main([str(arg) for arg in args]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    def changed(self, plane, folder, change):
        """A copy of the study with other content of study.json."""
        copy = shutil.copytree(plane, folder)
        facts = read_json(copy / "study.json")
        change(facts)
        (copy / "study.json").write_text(json.dumps(facts))
        return copy

    def test_too_few_checkpoints(self, plane, tmp_path, capsys):
        few = shutil.copytree(plane, tmp_path / "few")
        for path in sorted((few / "expert-1/checkpoints").glob("*.ckpt"))[:-1]:
            path.unlink()
        error = self.refused(capsys, "convergence", few)
        assert "kept 1 checkpoints" in error and "--checkpoint.keep null" in error

    def test_unfinished(self, plane, tmp_path, capsys):
        half = shutil.copytree(plane, tmp_path / "half")
        (half / "expert-2/done.json").unlink()
        assert "expert-2 is not trained" in self.refused(capsys, "combinations", half)

    def test_no_study(self, tmp_path, capsys):
        assert "holds no study.json" in self.refused(capsys, "compare", tmp_path)

    def test_no_experts(self, plane, tmp_path, capsys):
        def alone(facts):
            facts["jobs"] = {"baseline": facts["jobs"]["baseline"]}

        single = self.changed(plane, tmp_path / "single", alone)
        for verb in ("convergence", "combinations"):
            assert "has no experts" in self.refused(capsys, verb, single)
        none = self.changed(plane, tmp_path / "none", lambda facts: facts["jobs"].clear())
        assert "has no baseline" in self.refused(capsys, "compare", none, plane)

    def test_a_study_of_an_older_version(self, plane, tmp_path, capsys):
        old = self.changed(plane, tmp_path / "old", lambda facts: facts.pop("evaluation"))
        assert "launch it again" in self.refused(capsys, "combinations", old)

    @pytest.mark.parametrize("option", ["seeds=[]", "seeds=[1,1]", "samples=0"])
    def test_nothing_to_draw(self, plane, capsys, option):
        assert "draw" in self.refused(capsys, "combinations", plane, f"--{option}")

    def test_the_same_study_twice(self, plane, capsys):
        assert "name each once" in self.refused(capsys, "compare", plane, plane)


ADAPTIVE = [
    "--study.budget={class_path: Adaptive, init_args: {rounds: 3, patience: 1, loss_fall: 0.5}}",
    "--model.lr_scheduler=null", "--study.baseline=false", "--checkpoint.every_n_steps=2",
]  # fmt: skip
CHECKED = "--study.budget.init_args.check_points=[2]"


class TestAdaptive:
    @pytest.fixture(scope="class")
    def study(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("adaptive")
        assert launched(root, "study", *ADAPTIVE) == 0
        return root / "study"

    def test_rounds_and_their_decisions(self, study):
        ledger = read_json(study / "ledger.json")
        steps = [Expert.read(study / f"expert-{i}").step for i in range(3)]
        assert steps == ledger[-1]["budgets"] == ledger[-1]["until"] and sum(steps) <= 60
        assert len(list((study / "rounds").iterdir())) == len(ledger)
        facts = read_json(study / "study.json")["jobs"]
        assert [facts[f"expert-{i}"]["iterations"] for i in range(3)] == steps
        assert (study / "report.html").is_file()

    def test_check_points_measure_distances(self, tmp_path):
        options = ["--model.partition.edges=[0,0.5,1]", "--study.evaluation.seeds=[0]", CHECKED]
        tiny = [*TINY, f"--study.root={tmp_path}", *ADAPTIVE[:3]]
        assert main(["launch", *tiny, *options]) == 0
        ledger = read_json(tmp_path / "tiny/ledger.json")
        inputs = [entry["inputs"] for entry in ledger[1:]]
        assert list(map(sorted, inputs)) == [["losses"], ["advanced", "distance", "losses"]]
        assert inputs[1]["distance"] not in inputs[1]["advanced"] and ledger[2]["falls"]["distance"]

    def test_the_same_command_trains_nothing_again(self, study, capsys):
        assert launched(study.parent, "study", *ADAPTIVE) == 0
        assert "expert-0: finished before" in capsys.readouterr().out

    def test_a_baseline_is_trained_after_the_rounds(self, study, tmp_path, capsys):
        copy = shutil.copytree(study, tmp_path / "study")
        assert launched(tmp_path, "study", *ADAPTIVE, "--study.baseline=true") == 0
        told = capsys.readouterr().out
        rounds = len(read_json(copy / "ledger.json"))
        assert told.index(f"round {rounds}: ") < told.index("baseline is trained")

    def test_experts_equal_those_of_the_budget_that_was_found(self, study, tmp_path):
        steps = read_json(study / "ledger.json")[-1]["budgets"]
        assert launched(tmp_path, "same", *ADAPTIVE, f"--study.budget={steps}") == 0
        for i in range(3):
            ours, theirs = (
                Expert.read(folder / f"expert-{i}") for folder in (study, tmp_path / "same")
            )
            assert all((ours.weights[key] == theirs.weights[key]).all() for key in ours.weights)

    def test_a_kill_while_a_round_is_validated_changes_nothing(self, study, tmp_path, monkeypatch):
        def killed(self, trainer, *args):
            if trainer.global_step == second:
                raise RuntimeError("killed")

        copy = shutil.copytree(study, tmp_path / "study")
        ledger = read_json(copy / "ledger.json")
        first, second = (entry["until"][1] for entry in ledger[:2])
        assert second % 2 == 0  # a checkpoint is due at the very step of the validation
        folder = copy / "expert-1"
        for path in folder.glob("checkpoints/step-*"):
            if int(path.name[5:13]) > first:
                path.unlink()
        config = yaml.safe_load((folder / "job.yaml").read_text())
        config["study"]["budget"] = ledger[1]["until"]
        config["trainer"]["val_check_interval"] = second
        config["study"]["root"] = str(tmp_path)
        (folder / "job.yaml").write_text(yaml.safe_dump(config))
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(LossByInterval, "on_validation_end", killed)
            main(["fit", "--config", str(folder / "job.yaml")])
        (copy / "ledger.json").write_text(json.dumps(ledger[:2]))
        assert launched(tmp_path, "study", *ADAPTIVE) == 0
        assert read_json(copy / "ledger.json") == ledger

    def test_a_ledger_that_was_changed_is_refused(self, study, tmp_path, capsys):
        copy = shutil.copytree(study, tmp_path / "study")
        ledger = read_json(copy / "ledger.json")
        ledger[1]["until"][0] += 1
        (copy / "ledger.json").write_text(json.dumps(ledger))
        assert launched(tmp_path, "study", *ADAPTIVE) == 2
        assert "does not follow from the ledger" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "options, why",
        [
            (["--model.lr_scheduler=CosineAnnealingLR", "--model.lr_scheduler.T_max=0"],
             "choose another lr_scheduler"),
            (["--model.timesteps=CLTS", "--trainer.callbacks+=MDLRC"],
             "goes by the length of the run (CLTS, MDLRC), because that is not known"),
            ([CHECKED], "or check_points []"),
            (["--study.evaluation=null"], "names no judge"),
            (["--study.evaluation.judge=null"], "names no judge"),
        ],
    )  # fmt: skip
    def test_what_is_refused_leaves_the_folder_free(self, tmp_path, capsys, options, why):
        assert launched(tmp_path, "study", *ADAPTIVE, *options) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "study").exists()

    def test_an_expert_alone_does_not_know_its_steps(self, tmp_path, capsys):
        root = f"--study.root={tmp_path}"
        assert main(["fit", *PLANE, *SMALL, *ADAPTIVE, root, "--model.expert=1"]) == 2
        assert "decided in rounds by expertdiff launch" in capsys.readouterr().err


def test_neither_seconds_nor_speed_count_validation(tmp_path, monkeypatch):
    now = [1.0]  # steps take one second, validation batches a thousand

    def ticking(name, seconds):
        original = getattr(LossByInterval, name)

        def hook(*args):
            now[0] += seconds
            original(*args)

        monkeypatch.setattr(LossByInterval, name, hook)

    ticking("on_train_batch_end", 1.0)
    ticking("on_validation_batch_end", 1000.0)
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("expertdiff.callbacks.checkpoint.time", clock)
    monkeypatch.setattr("expertdiff.callbacks.monitor.time", clock)
    assert main(["fit", *PLANE, *SMALL, f"--study.root={tmp_path}", "--model.expert=1"]) == 0
    assert now[0] > 1000
    folder = tmp_path / "moons-mdm/expert-1"
    done = read_json(folder / "done.json")
    assert done["seconds"] == done["step"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds"] == line["step"] for line in lines)
    assert {line["steps_per_second"] for line in lines if "steps_per_second" in line} == {1.0}


def test_intervals_are_chosen_and_compared(tmp_path, capsys):
    base = ["intervals", *PLANE, *SMALL, f"--study.root={tmp_path}", "--k=2"]
    options = [f"--output={tmp_path}/out", "--method=LogSNR", "--train=20"]
    assert main([*base, *options]) == 0
    edges = edges_of(tmp_path / "out/intervals.json")
    assert len(edges) == 3 and read_json(tmp_path / "out/LogSNR/study.json")["partition"] == edges
    with open(tmp_path / "out/trained.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["intervals"] for row in rows] == ["baseline", "LogSNR"]
    told = read_json(tmp_path / "out/LogSNR/tests/stitched/metrics.json")
    assert float(rows[1][told["metric"]]) == told["mean"]
    assert capsys.readouterr().out.endswith(f"table: {tmp_path}/out/trained.csv\n")


def test_a_file_of_many_methods_is_no_partition(tmp_path, capsys):
    (tmp_path / "all.json").write_text('{"methods": {}}')
    assert launched(tmp_path, "cut", f"--partition={tmp_path}/all.json") == 2
    assert "has no edges on top" in capsys.readouterr().err
