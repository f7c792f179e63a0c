"""The report of fake study folders: its words, its numbers, its missing parts, its one file."""

import json
import math
import re
from html.parser import HTMLParser
from statistics import mean, stdev

import pytest
import torch
from PIL import Image

from expertdiff.describe import describe
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.samplers import DDIM
from expertdiff.report import chain_figure, write_report
from expertdiff.report.figures import BASELINE_COLOUR, EXPERT_COLOUR, loss_figure, svg
from expertdiff.report.study import read_study
from expertdiff.report.verdict import cost, missing, verdict
from expertdiff.studies.trained import Trained

EDGES = [0, 0.1, 0.8, 1]
ITERATIONS = {"baseline": 1000, "expert-0": 100, "expert-1": 500, "expert-2": 400}
EXPERTS = {name: n for name, n in ITERATIONS.items() if name != "baseline"}


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_study(folder, name="toy", tests=True):
    """A finished study: a baseline and three experts at equal total iterations."""
    intervals = {"baseline": [0, 1]} | {f"expert-{i}": EDGES[i : i + 2] for i in range(3)}
    facts = {
        "name": name,
        "partition": EDGES,
        "process": describe(DiscreteVP(CosineBetas(), 100)),
        "data": {"class_path": "expertdiff.data.Toy", "init_args": {"size": 8}},
        "iterations": 1000,
        "seed": 7,
        "jobs": {
            job: {"interval": intervals[job], "iterations": n} for job, n in ITERATIONS.items()
        },
    }
    dump(folder / "study.json", facts)
    for job, n in ITERATIONS.items():
        owned = range(3) if job == "baseline" else [int(job[-1])]
        lines = [
            {"step": step, "seconds": step / 10}
            | {f"val/mse/{i}": (1 + 0.02 * i) / (5 + step) ** 0.5 for i in owned}
            | {f"val/vb/{i}": 0.3 / (9 + step) ** 0.5 for i in owned}
            for step in range(n // 10, n + 1, n // 10)
        ]
        (folder / job).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / job / "metrics.jsonl").write_text(text)
        record = {"step": n, "max_steps": n, "seconds": n / 10, "sha256": "f" * 64, "device": "cpu"}
        dump(folder / job / "done.json", record)
    if tests:
        make_test(folder, "baseline", [1.28, 1.31, 1.34], {"baseline": 1000}, calls=[50])
        make_test(folder, "stitched", [1.21, 1.23, 1.25], EXPERTS)
    return folder


def make_test(folder, name, values, steps, **changes):
    metrics = {
        "name": name,
        "metric": "FD-pixels",
        "values": values,
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "seeds": list(range(len(values))),
        "samples": 500,
        "sampler": describe(DDIM("ddim50")),
        "nfe": 50,
        "calls": [5, 35, 10],
        "reference": "validation",
        "reference_samples": 200,
        "extractor": "pixels",
        "ema_decay": 0.999,
        "precision": "32-true",
        "data": "Toy",
        "seconds": 12.0,
        "device": "cpu",
        "floor": 0.8,
        "floor_samples": 500,
        "steps": steps,
    }
    dump(folder / "tests" / name / "metrics.json", metrics | changes)
    Image.new("RGB", (64, 32), "red").save(folder / "tests" / name / "grid.png")


class Page(HTMLParser):
    """Tags with their attributes, and the text of a report."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def fake(tmp_path):
    return make_study(tmp_path)


@pytest.mark.parametrize(
    "values, words",
    [
        # means 1.23 and 1.31, two standard deviations of the difference: 2 sqrt(.02^2 + .03^2)
        ([1.21, 1.23, 1.25], "the experts are better by 6.1 %, more than the sampling spread"),
        ([1.37, 1.39, 1.41], "the baseline is better by 6.1 %, more than the sampling spread"),
        ([1.24, 1.26, 1.28], "difference of 3.8 % is within the sampling spread"),
        ([1.23], "better by 6.1 % with this one seed, which cannot tell a difference from chance"),
    ],
)
def test_the_verdict_names_the_winner_only_beyond_the_sampling_spread(fake, values, words):
    make_test(fake, "baseline", [1.28, 1.31, 1.34][: len(values)], {"baseline": 1000}, mean=1.31)
    make_test(fake, "stitched", values, EXPERTS)
    # With one seed the two tests still share their seeds, so they stay comparable.
    assert words in verdict(read_study(fake))


def test_the_verdict_gives_the_numbers_it_rests_on(fake):
    noise = 2 * math.sqrt(0.02**2 + 0.03**2)
    assert verdict(read_study(fake)) == (
        "Stitched experts: FD-pixels 1.230 ± 0.020, baseline 1.310 ± 0.030 at equal total "
        "iterations (n = 500 samples, 3 sampling seeds): the experts are better by 6.1 %, more "
        f"than the sampling spread (difference 0.08, 2 standard deviations {noise:.2g})."
    )


def test_the_verdict_says_when_the_budgets_differ(fake):
    make_test(fake, "stitched", [1.21, 1.23, 1.25], EXPERTS | {"expert-1": 110})
    assert "with the experts at 61 % of the baseline's iterations" in verdict(read_study(fake))


def test_no_verdict_on_numbers_measured_differently(fake):
    make_test(fake, "stitched", [1.0, 1.0, 1.1], EXPERTS, samples=5000)
    words = verdict(read_study(fake))
    assert words.startswith("No verdict") and "samples: 5000 != 500" in words


@pytest.mark.parametrize(
    "gone, words",
    [
        (["stitched"], "the stitched experts are not tested; baseline FD-pixels 1.310 ± 0.030"),
        (["baseline"], "the baseline is not tested; stitched experts FD-pixels 1.230 ± 0.020"),
        (["baseline", "stitched"], "nothing has been tested"),
    ],
)
def test_no_verdict_before_both_are_tested(fake, gone, words):
    for name in gone:
        (fake / "tests" / name / "metrics.json").unlink()
    words_now = verdict(read_study(fake))
    assert words_now.startswith("No verdict yet") and words in words_now


def test_a_study_without_a_baseline_is_complete(fake):
    facts = json.loads((fake / "study.json").read_text())
    del facts["jobs"]["baseline"]
    dump(fake / "study.json", facts)
    (fake / "tests" / "baseline" / "metrics.json").unlink()
    assert missing(read_study(fake)) == []
    assert verdict(read_study(fake)).startswith("No baseline in this study; stitched experts")


def test_costs_of_mdm_allocations(fake):
    # MDM's starting budgets: 50k + 350k + 100k of 500k, each expert on its own device.
    facts = json.loads((fake / "study.json").read_text())
    dump(fake / "study.json", facts | {"iterations": 500_000})
    make_test(fake, "stitched", [1.0, 1.1], dict(zip(EXPERTS, (50_000, 350_000, 100_000))))
    loaded = read_study(fake)
    spent = cost(loaded, loaded.results["stitched"])
    assert (spent.total, spent.longest, spent.ntc, spent.nwct) == (500_000, 350_000, 100, 70)


def test_costs_in_seconds_follow_the_tested_step_and_the_devices(fake):
    record = json.loads((fake / "expert-2" / "done.json").read_text())
    dump(fake / "expert-2" / "done.json", record | {"devices": 2})
    make_test(fake, "stitched", [1.0, 1.1], EXPERTS | {"expert-1": 250})
    loaded = read_study(fake)
    spent = cost(loaded, loaded.results["stitched"])
    assert spent.wall == pytest.approx(40)  # expert-2: 400 steps of 0.1 s
    assert spent.device == pytest.approx(10 + 25 + 2 * 40)
    make_test(fake, "stitched", [1.0, 1.1], {"another study's expert": 100})
    loaded = read_study(fake)
    assert cost(loaded, loaded.results["stitched"]).wall is None


def test_the_report_shows_costs_distances_and_the_floor(fake):
    text = Page(write_report(fake)).text
    assert "stitched 1,000 500 100.0 50.0 50 s (50 %) 100 s (100 %)" in text
    assert "stitched FD-pixels 1.230 ± 0.020 1.21, 1.23, 1.25 500 50 validation, 200" in text
    assert "real data of another split FD-pixels 0.8 – 500 –" in text
    assert "sampler DDIM(steps=ddim50, eta=0, clip=True)" in text
    assert "ema decay 0.999" in text and "data Toy(size=8)" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text


def test_what_is_missing_is_named(fake):
    (fake / "expert-1" / "done.json").unlink()
    # Killed in the middle of a line.
    with open(fake / "expert-1" / "metrics.jsonl", "a") as file:
        file.write('{"step": 510, "val/mse/1": 0.0')
    (fake / "expert-2" / "done.json").unlink()
    (fake / "expert-2" / "metrics.jsonl").unlink()
    (fake / "tests" / "stitched" / "grid.png").unlink()
    make_test(fake, "baseline", [1.3, 1.4], {"baseline": 900})
    assert missing(read_study(fake)) == [
        "expert-1: unfinished, at step 500 of 500",
        "expert-2: not started",
        "a test of baseline with all of baseline: this one has step 900 of 1,000",
        "the sample grid of stitched",
    ]
    text = Page(write_report(fake)).text
    assert "expert-2: not started" in text and "the sample grid of stitched" in text


def test_a_job_of_fewer_steps_than_planned_is_not_finished(fake):
    facts = json.loads((fake / "study.json").read_text())
    facts["jobs"]["expert-1"]["iterations"] = 700  # as in the rounds of an adaptive budget
    dump(fake / "study.json", facts)
    assert "expert-1: unfinished, at step 500 of 700" in missing(read_study(fake))
    with pytest.raises(ValueError, match="expert-1 is not trained"):
        Trained.open(fake)


def test_a_bundle_that_somebody_made_may_be_of_any_steps(fake):
    make_test(fake, "a-only", [1.3, 1.4], {"baseline": 900})
    assert missing(read_study(fake)) == []


def test_a_study_that_has_only_begun_has_a_report(tmp_path):
    make_study(tmp_path, tests=False)
    for job in ITERATIONS:
        (tmp_path / job / "done.json").unlink()
        (tmp_path / job / "metrics.jsonl").unlink()
    text = Page(write_report(tmp_path)).text
    for words in ("No verdict yet", "the test of stitched", "No validation loss", "No samples"):
        assert words in text


def test_a_study_with_a_tested_baseline_only_has_a_report(fake):
    (fake / "tests" / "stitched" / "metrics.json").unlink()
    text = Page(write_report(fake)).text
    assert "No verdict yet" in text and "the test of stitched" in text and "1.310 ± 0.030" in text


def test_a_finished_study_misses_nothing(fake):
    assert missing(read_study(fake)) == []


def test_all_text_is_escaped(tmp_path):
    name = "<script>alert('&\"')</script>"
    make_study(tmp_path, name=name)
    make_test(tmp_path, "mix <b>", [1.0, 1.1], EXPERTS, extractor="<img src=x>")
    page = Page(write_report(tmp_path))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "b" not in names
    assert names.count("img") == 3  # the grids
    assert page.text.count(name) == 2 and "<img src=x>" in page.text  # title and heading


def test_the_page_is_one_file(fake):
    page = Page(write_report(fake))
    for name, attributes in page.tags:
        assert name not in ("script", "link", "iframe")
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,"))
    style = re.search("<style>(.*?)</style>", (fake / "report.html").read_text(), re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert [name for name, _ in page.tags].count("svg") == 4  # the chain, mse, ratio, vb


def test_grids_are_shown_at_one_whole_magnification(fake):
    Image.new("RGB", (100, 50)).save(fake / "tests" / "baseline" / "grid.png")
    images = [attributes for name, attributes in Page(write_report(fake)).tags if name == "img"]
    assert [int(image["width"]) for image in images] == [5 * 100, 5 * 64]


def test_the_page_is_replaced_whole_or_not_at_all(fake, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    (fake / "report.html").write_text("the old page")
    with pytest.raises(OSError, match="no space"):
        write_report(fake)
    assert (fake / "report.html").read_text() == "the old page"
    assert not list(fake.glob(".*"))


def test_a_variance_that_is_not_learned_has_no_panel(fake):
    for job in ITERATIONS:
        path = fake / job / "metrics.jsonl"
        path.write_text(re.sub(r'("val/vb/\d": )[^,}]*', r"\g<1>0.0", path.read_text()))
    assert loss_figure(read_study(fake), "vb", "vb") is None
    assert loss_figure(read_study(fake), "mse", "mse") is not None


def test_the_same_figure_gives_the_same_svg_in_the_colour_of_the_page():
    first, second = (
        svg(chain_figure(Partition(EDGES), DiscreteVP(CosineBetas(), 50))) for _ in range(2)
    )
    assert first == second
    assert "currentColor" in first and "#000000" not in first and "#ffffff" not in first


def test_the_loss_panels_draw_each_job_in_its_own_interval(fake):
    figure = loss_figure(read_study(fake), "mse", "mse")
    for i, axes in enumerate(figure.axes):
        curves = {line.get_color(): line for line in axes.lines if len(line.get_xdata()) > 1}
        assert curves[BASELINE_COLOUR].get_xdata()[-1] == 1000
        assert curves[EXPERT_COLOUR].get_xdata()[-1] == ITERATIONS[f"expert-{i}"]
        ratio = (1005 / (5 + ITERATIONS[f"expert-{i}"])) ** 0.5
        assert axes.texts[0].get_text().endswith(f": {ratio:.3f}")


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no study.json"):
        write_report(tmp_path)


def test_the_chain_shows_schedule_owners_and_costs():
    process = DiscreteVP(CosineBetas(), 50)
    figure = chain_figure(Partition(EDGES), process, [10, 2000, 30], [5, 35, 10])
    snr, coefficients, table = figure.axes
    bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in snr.patches]
    assert bands == [pytest.approx(band) for band in zip(EDGES, EDGES[1:])]
    x, y = snr.lines[0].get_data()
    assert y[-1] == pytest.approx(math.log(process.alpha_bar[-1] / (1 - process.alpha_bar[-1])))
    alpha, sigma = (line.get_ydata() for line in coefficients.lines)
    assert alpha[0] ** 2 + sigma[0] ** 2 == pytest.approx(1) and alpha[0] > alpha[-1]
    texts = {text.get_text() for text in table.texts}
    assert {"0–4", "5–39", "40–49", "0.1–0.8", "2,000", "35", "sampler calls"} <= texts


@pytest.mark.parametrize("n", [1, 8, 20])
def test_the_numbers_of_a_chain_fit_their_cells(n):
    partition = Partition([k / n for k in range(n + 1)])
    figure = chain_figure(partition, DiscreteVP(CosineBetas()), [1_000_000] * n)
    boxes = [text.get_window_extent() for text in figure.axes[2].texts if text.get_text()]
    boxes.sort(key=lambda box: (round(box.y0), box.x0))
    for left, right in zip(boxes, boxes[1:]):
        assert abs(left.y0 - right.y0) > 2 or left.x1 < right.x0


def test_a_chain_needs_one_number_an_expert():
    with pytest.raises(ValueError, match=r"iterations \[1, 2\].*one number for each"):
        chain_figure(Partition(EDGES), DiscreteVP(CosineBetas()), [1, 2])
