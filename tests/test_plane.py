"""Every method, verb and table on points of the plane, through the front door."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from expertdiff.bundle import Bundle
from expertdiff.cli import main
from expertdiff.evaluation.knn_kl import knn_kl_divergence
from expertdiff.experts.gated import GatedExperts
from expertdiff.files import read_json
from expertdiff.tables import dualdiff, plan, score
from expertdiff.tables.rows import Row

ROOT = Path(__file__).parents[1]


def config(name):
    return ["--config", str(ROOT / f"configs/toys/{name}.yaml"),
            "--config", str(ROOT / "tests/conf/toy.yaml")]  # fmt: skip


def points(path):
    return np.loadtxt(path, delimiter=",", skiprows=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A launched study of each shipped config."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("dualdiff", "mdm"):
        options = [f"--study.root={root}", f"--study.name={name}", "--parallel=2"]
        assert main(["launch", *config(name), *options]) == 0
    return root


def test_every_method_is_trained_tested_and_told(runs):
    for study, bundles in (("dualdiff", ["dualdiff"]), ("mdm", ["baseline", "stitched"])):
        assert sorted(p.name for p in (runs / study / "tests").iterdir()) == bundles
        for bundle in bundles:
            result = read_json(runs / study / "tests" / bundle / "metrics.json")
            assert result["metric"] == "KL" and len(result["values"]) == 2
            assert set(result["further"]) == {"reverse KL", "sliced W1", "MMD^2"}
            assert (runs / study / "tests" / bundle / "grid.png").is_file()
        page = (runs / study / "report.html").read_text()
        assert "reverse KL" in page and "real data of another split" in page
    page = (runs / "dualdiff/report.html").read_text()
    assert "One model, nothing to compare it with" in page and "not finished" not in page
    assert not (runs / "mdm/tests/baseline/losses.json").exists()
    losses = read_json(runs / "mdm/tests/stitched/losses.json")
    assert losses["intervals"] == [[0, 0.3], [0.3, 0.6], [0.6, 1]]
    assert "Loss by expert" in (runs / "mdm/report.html").read_text()
    assert len(Bundle.load(runs / "mdm/bundles/stitched").manifest["experts"]) == 3


def test_training_leaves_pictures_of_points_and_gates(runs):
    job = runs / "dualdiff/dualdiff"
    for folder in ("grids", "gates"):
        pictures = sorted(p.name for p in (job / folder).iterdir())
        assert pictures == [f"step-{step:08d}.png" for step in (4, 8, 12)]


def test_the_tested_kl_is_that_of_the_drawn_points(runs, tmp_path):
    bundle, data = runs / "dualdiff/bundles/dualdiff", tmp_path / "samples"
    options = ["--samples=60", "--seed=1", f"--output={data}"]
    assert main(["sample", str(bundle), *options]) == 0
    result = read_json(runs / "dualdiff/tests/dualdiff/metrics.json")
    from expertdiff.data.densities import Moons

    real = Moons().points("validation", 300).astype(np.float32)
    ours = points(data / "samples.csv")
    assert ours.shape == (60, 2)
    assert knn_kl_divergence(real, ours) == pytest.approx(result["values"][1], abs=1e-4)
    with Image.open(data / "samples.png") as picture:
        assert picture.size == (600, 600)


def test_points_do_not_depend_on_the_batch(runs, tmp_path):
    bundle = str(runs / "mdm/bundles/stitched")
    for size in (7, 30):
        options = ["--samples=30", f"--batch_size={size}", f"--output={tmp_path / str(size)}"]
        assert main(["sample", bundle, *options]) == 0
    first, second = (points(tmp_path / str(size) / "samples.csv") for size in (7, 30))
    assert np.allclose(first, second, rtol=1e-3, atol=1e-3)


def test_own_points_come_back_in_their_own_coordinates(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "own.csv"
    own = 1000 + 50 * rng.normal(size=(400, 2))
    np.savetxt(file, own, delimiter=",", header="x,y", comments="")
    options = ["--data.density=PointsFile", f"--data.density.path={file}"]
    assert main(["launch", *config("dualdiff"), *options, f"--study.root={tmp_path}"]) == 0
    bundle = tmp_path / "dualdiff/bundles/dualdiff"
    assert main(["sample", str(bundle), "--samples=200"]) == 0
    drawn = points(bundle / "samples/samples.csv")
    assert (np.abs(drawn.mean(0) - 1000) < 100).all() and (drawn.std(0) > 5).all()


def test_a_sampler_that_clips_is_refused_for_points(runs, capsys):
    bundle = str(runs / "dualdiff/bundles/dualdiff")
    assert main(["sample", bundle, "--sampler=DDIM"]) == 2
    assert "set clip to false" in capsys.readouterr().err


def test_several_seeds_are_no_study(tmp_path, capsys):
    options = [f"--study.root={tmp_path}", "--model.seeds=[0,1]"]
    assert main(["launch", *config("dualdiff"), *options]) == 2
    assert "model.seeds [0, 1] cannot be launched" in capsys.readouterr().err


def test_unknown_set_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *config("dualdiff"), f"--study.root={tmp_path}", "--data.density=Cat"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Cat is no density: choose from Checkerboard, Circle, Dino" in said


PRESET = """
like: paper
sets: [moons]
seeds: [0, 1]
schedules:
  short:
    class_path: expertdiff.diffusion.process.DiscreteVP
    init_args: {betas: {class_path: expertdiff.diffusion.process.QuadraticBetas}, T: 10}
reference: validation
base:
  study: {iterations: 6}
  data: {init_args: {batch_size: 8, samples: 200, validation_samples: 20}}
  trainer: {accelerator: cpu, precision: 32-true, val_check_interval: 6}
models:
  baseline: {}
  dual: {model: {init_args: {network: {class_path: GatedExperts}}}}
pairs: {dual: baseline}
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    path.write_text(PRESET)
    return path


@pytest.fixture(scope="module")
def table(preset, tmp_path_factory):
    """The folder of a tiny table."""
    folder = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("POINTS", 400), ("SAMPLES", 40), ("LIKELIHOODS", 5)):
            patch.setattr(score, name, value)
        command = ["table", "dualdiff", f"--preset={preset}", f"--output={folder}"]
        assert main(command) == 0
        marks = {path: path.stat().st_mtime_ns for path in folder.rglob("scores.json")}
        assert main(command) == 0  # nothing is trained or scored twice
        assert marks == {path: path.stat().st_mtime_ns for path in folder.rglob("scores.json")}
    return folder


@pytest.fixture
def own(tmp_path):
    """A preset of 300 points of a file."""
    np.savetxt(tmp_path / "own.csv", np.random.default_rng(0).normal(size=(300, 2)), delimiter=",")
    block = f"{{class_path: expertdiff.data.PointsFile, init_args: {{path: {tmp_path}/own.csv}}}}"
    text = PRESET.replace("sets: [moons]", f"sets: {{own: {block}}}")
    path = tmp_path / "own.yaml"
    path.write_text(text.partition("  dual:")[0] + "pairs: {}\n")
    return path


def read_rows(folder):
    return [Row(**row) for row in read_json(folder / "rows.json")]


class TestTable:
    def test_rows_for_floors_and_models(self, table):
        found = {row.model: row for row in read_rows(table)}
        assert list(found) == ["fresh", "exact", "baseline", "dual"]
        assert found["dual"].parameters == sum(p.numel() for p in GatedExperts().parameters())
        assert found["dual"].seconds > 0 and found["fresh"].parameters is None
        for model in ("baseline", "dual"):
            assert len(found[model].scores["KL"]) == 2
            assert found[model].mean("excess") == pytest.approx(
                found[model].mean("loss") - found["exact"].mean("loss")
            )

    def test_the_csv_says_the_same(self, table):
        with open(table / "table.csv") as file:
            lines = {line["model"]: line for line in csv.DictReader(file)}
        ours = {row.model: row for row in read_rows(table)}
        assert float(lines["dual"]["KL mean"]) == pytest.approx(ours["dual"].mean("KL"))
        assert float(lines["dual"]["KL std"]) == pytest.approx(ours["dual"].std("KL"))

    def test_the_page_has_pictures(self, table):
        page = (table / "table.html").read_text()
        assert "data:image/gif" in page and "Gates of dual" in page and "<svg" in page
        assert "bits from the normal distribution" in page

    def test_each_seed_is_a_bundle(self, table):
        a, b = (Bundle.load(table / f"moons/short/dual/seed-{s}/bundle") for s in (0, 1))
        weight = "network.experts.0.0.weight"
        assert not torch.equal(a.denoiser.state_dict()[weight], b.denoiser.state_dict()[weight])

    def test_changed_settings_are_refused_by_name(self, preset, table, capsys):
        command = ["table", "dualdiff", f"--preset={preset}", f"--output={table}"]
        assert main([*command, "--steps=7"]) == 2
        assert "study.iterations: 7 != 6" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "options, words",
        [
            (["--sets=[cat]"], "'cat' is no set: choose from"),
            (["--models=[huge]"], "'huge' is no model of the preset: choose from baseline"),
            (["--schedules=[odd]"], "'odd' is no schedule"),
            (["--seeds=[1,1]"], "seeds [1, 1] must be different"),
            (["--preset=nowhere"], "'nowhere' is no preset and no file"),
            (["--sets=[moons]", "--parallel=0"], "parallel 0 runs nothing"),
        ],
    )
    def test_refusals(self, options, words, tmp_path, capsys):
        assert main(["table", "dualdiff", f"--output={tmp_path}", *options]) == 2
        assert words in capsys.readouterr().err

    @pytest.mark.parametrize(
        "right, wrong, words",
        [
            ("betas: {class_path", "beta: {class_path", "unexpected keyword argument 'beta'"),
            (
                "T: 10}",
                "T: 10}\nsampler: {init_args: {clip: false}}",
                "'clip': False}}: 'class_path'",
            ),
            ("T: 10}", "T: 10}\nsampler: DDPM", "its sampler cannot be 'DDPM'"),
            ("sets: [moons]", "sets: {own: Moons}", "'Moons': string indices"),
            ("sets: [moons]", "sets: {own: {class_path: [Moons]}}", "{'class_path': ['Moons']}: "),
            ("  baseline: {}", "  baseline: MLPDenoiser", "its model baseline cannot be 'MLPDen"),
            ("reference: validation", "reference: test", "its reference 'test' is none of"),
        ],
    )
    def test_mistakes_of_a_preset_are_told(self, right, wrong, words, tmp_path, capsys):
        path = tmp_path / "own.yaml"
        path.write_text(PRESET.replace(right, wrong))
        assert main(["table", "dualdiff", f"--output={tmp_path}", f"--preset={path}"]) == 2
        said = capsys.readouterr().err
        assert f"{path} is not a preset (" in said and words in said and "see paper.yaml" in said

    def test_own_points_have_as_many_fresh_ones_as_seeds_take(self, own, monkeypatch, capsys):
        monkeypatch.setattr(dualdiff, "train", lambda *_: pytest.fail("trained"))
        command = ["table", "dualdiff", f"--preset={own}", f"--output={own.parent / 'table'}"]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "set own has 270 train points, and 2 seeds of fresh ones take 11,000 or more" in said

    def test_own_points_have_no_exact_denoiser(self, own, monkeypatch):
        for name, value in (("SAMPLES", 60), ("LIKELIHOODS", 5)):
            monkeypatch.setattr(score, name, value)
        folder = own.parent / "table"
        assert main(["table", "dualdiff", f"--preset={own}", f"--output={folder}"]) == 0
        found = {row.model: row for row in read_rows(folder)}
        assert list(found) == ["fresh", "baseline"]
        assert "loss" in found["baseline"].scores and "excess" not in found["baseline"].scores

    @pytest.mark.parametrize("name", sorted(path.stem for path in plan.PRESETS.glob("*.yaml")))
    def test_every_preset_is_what_fit_takes(self, name, tmp_path):
        from expertdiff.expert_cli import ConfigOnly

        for cell in plan.Plan(name, tmp_path, sets=["moons"]).groups()[0]:
            path = tmp_path / "cell.yaml"
            path.write_text(json.dumps(cell.config))
            cli = ConfigOnly(["--config", str(path)])
            assert len(cli.model.seeds) == len(cell.config["model"]["init_args"]["seeds"])
