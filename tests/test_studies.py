"""Questions to a trained study: convergence, combinations, cost; and budgets decided in rounds."""

import csv
import json
import shutil

import pytest
from conftest import ROOT
from PIL import Image

from expertdiff.bundle import Expert
from expertdiff.cli import main
from expertdiff.config_verbs import edges_of
from expertdiff.files import read_json

PLANE = ["--config", str(ROOT / "configs/toys/mdm.yaml")]
SMALL = [
    "--study.iterations=60", "--model.network.width=16", "--data.batch_size=32",
    "--trainer.log_every_n_steps=10", "--trainer.val_check_interval=20",
    "--study.evaluation.samples=60", "--study.evaluation.seeds=[0,1]",
    "--study.evaluation.judge.k=3", "--data.samples=300", "--data.validation_samples=64",
    "--trainer.callbacks=[LossByInterval]", "--trainer.logger=JsonLines",
    "--trainer.accelerator=cpu", "--checkpoint.every_n_steps=10", "--checkpoint.keep=null",
]  # fmt: skip


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


def test_compare(plane, tmp_path):
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


class TestRefuses:
    def refused(self, capsys, *args):
        assert main([str(arg) for arg in args]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

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


ADAPTIVE = [
    "--study.budget={class_path: Adaptive, init_args: "
    "{rounds: 3, check_points: [2], patience: 1, loss_fall: 0.5}}",
    "--model.lr_scheduler=null",
]


class TestAdaptive:
    @pytest.fixture(scope="class")
    def study(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("adaptive")
        assert launched(root, "study", *ADAPTIVE, "--study.baseline=false") == 0
        return root / "study"

    def test_rounds_and_their_decisions(self, study):
        ledger = read_json(study / "ledger.json")
        steps = [Expert.read(study / f"expert-{i}").step for i in range(3)]
        assert steps == ledger[-1]["budgets"] == ledger[-1]["until"] and sum(steps) <= 60
        inputs = [entry.get("inputs", {}) for entry in ledger]
        assert [sorted(i) for i in inputs[1:3]] == [["losses"], ["advanced", "distance", "losses"]]
        assert len(list((study / "rounds").iterdir())) == len(ledger)
        facts = read_json(study / "study.json")["jobs"]
        assert [facts[f"expert-{i}"]["iterations"] for i in range(3)] == steps
        assert (study / "report.html").is_file()

    def test_the_same_command_trains_nothing_again(self, study, capsys):
        assert launched(study.parent, "study", *ADAPTIVE, "--study.baseline=false") == 0
        assert "expert-0: finished before" in capsys.readouterr().out

    def test_experts_equal_those_of_the_budget_that_was_found(self, study, tmp_path):
        steps = read_json(study / "ledger.json")[-1]["budgets"]
        assert (
            launched(
                tmp_path, "same", f"--study.budget={steps}", *ADAPTIVE[1:], "--study.baseline=false"
            )
            == 0
        )
        for i in range(3):
            ours, theirs = (
                Expert.read(folder / f"expert-{i}") for folder in (study, tmp_path / "same")
            )
            assert all((ours.weights[key] == theirs.weights[key]).all() for key in ours.weights)

    def test_a_ledger_that_was_changed_is_refused(self, study, tmp_path, capsys):
        copy = shutil.copytree(study, tmp_path / "study")
        ledger = read_json(copy / "ledger.json")
        ledger[1]["until"][0] += 1
        (copy / "ledger.json").write_text(json.dumps(ledger))
        assert launched(tmp_path, "study", *ADAPTIVE) == 2
        assert "does not follow from the ledger" in capsys.readouterr().err

    def test_a_learning_rate_that_ends_with_the_run_is_refused(self, tmp_path, capsys):
        assert launched(tmp_path, "study", ADAPTIVE[0]) == 2
        assert "choose another lr_scheduler" in capsys.readouterr().err


def test_intervals_are_chosen_and_compared(tmp_path, capsys):
    base = ["intervals", *PLANE, *SMALL, f"--study.root={tmp_path}", "--k=2"]
    options = [f"--output={tmp_path}/out", "--method=LogSNR", "--train=20"]
    assert main([*base, *options]) == 0
    edges = edges_of(tmp_path / "out/intervals.json")
    assert len(edges) == 3 and read_json(tmp_path / "out/LogSNR/study.json")["partition"] == edges
    table = capsys.readouterr().out.rpartition("intervals  ")[2]
    assert "baseline" in table and "LogSNR" in table


def test_a_file_of_many_methods_is_no_partition(tmp_path, capsys):
    (tmp_path / "all.json").write_text('{"methods": {}}')
    assert launched(tmp_path, "cut", f"--partition={tmp_path}/all.json") == 2
    assert "has no edges on top" in capsys.readouterr().err
