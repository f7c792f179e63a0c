"""The page of a table: its words and numbers from rows, its pictures from files."""

import math
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from expertdiff.diffusion.exact import ExactDenoiser, Mixture
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.diffusion.samplers import DDIM, DDPM
from expertdiff.evaluation.points import limits_of, save_points
from expertdiff.report.figures import BASELINE_COLOUR, EXPERT_COLOUR
from expertdiff.tables.page import comparisons, nearest, write_page
from expertdiff.tables.pictures import FLOOR_COLOURS, animate, samples_figure, score_figure
from expertdiff.tables.rows import Row

PAIRS = {"dual": "single 420"}
KL = {
    "fresh": ([-0.08, -0.06], [0.06, 0.08]),
    "exact": ([-0.05, -0.03], [0.10, 0.12]),
    "baseline": ([1.12, 1.08], [1.46, 1.50]),
    "dual": ([0.82, 0.88], [1.15, 1.17]),
    "single 420": ([0.70, 0.74], [0.92, 0.94]),
}
SIZES = {"baseline": 296_450, "dual": 691_717, "single 420": 693_002}


def make_rows(folder, models=tuple(KL), name="dino", schedule="linear", seeds=2):
    rows = []
    for model in models:
        scores = {key: v[:seeds] for key, v in zip(("KL", "reverse KL"), KL[model])}
        seconds = 60.0 if model in SIZES else None
        place = str(folder / name / schedule / model)
        facts = (SIZES.get(model), seconds, list(range(3, 3 + seeds)))
        rows.append(Row(name, schedule, model, *facts, place, scores))
    return rows


def write(rows, folder, pairs=PAIRS):
    """The page and its text without tags and pictures."""
    html = write_page(rows, folder, "A <table>", ["seeds 3 and 4"], pairs).read_text()
    bare = re.sub(r"<(style|title|svg|head).*?</\1>", " ", html, flags=re.S)
    return html, " ".join(re.sub(r"<[^>]*>", " ", bare).split())


def with_kl(model, values, reverse=(0.0, 0.0)):
    return Row("s", "t", model, None, None, [0, 1], "", {"KL": values, "reverse KL": [*reverse]})


# Words --------------------------------------------------------------------------------------------


def test_a_difference_is_told_in_standard_errors_of_the_means(tmp_path):
    forward, backward = comparisons(make_rows(tmp_path), PAIRS)
    # Two seeds at distance d: variance d^2 / 2, so d^2 / 4 of the mean.
    error = math.sqrt(0.06**2 / 4 + 0.04**2 / 4)
    assert (forward.key, forward.outcome) == ("KL", "control")
    assert forward.gain == pytest.approx(0.72 - 0.85)
    assert forward.error == pytest.approx(error)
    assert str(forward) == (
        "KL 0.850 ± 0.042 and 0.720 ± 0.028, "
        f"single 420 nearer by 0.130 ({0.13 / error:.1f} standard errors)"
    )
    assert (backward.key, backward.gain) == ("reverse KL", pytest.approx(0.93 - 1.16))


def test_within_two_standard_errors_nobody_is_nearer():
    # The error of both means is .05, of their difference .0707.
    rows = [with_kl("dual", [0.45, 0.55]), with_kl("single 420", [0.60, 0.70])]
    equal = comparisons(rows, PAIRS)[0]
    rows[1].scores["KL"] = [0.59, 0.69]
    assert equal.outcome == "model" and "dual nearer by 0.150 (2.1 standard errors)" in str(equal)
    equal = comparisons(rows, PAIRS)[0]
    assert equal.outcome == "equal" and "no difference beyond the seeds (0.140" in str(equal)


def test_one_seed_tells_nothing_from_chance(tmp_path):
    rows = make_rows(tmp_path, seeds=1)
    assert [c.outcome for c in comparisons(rows, PAIRS)] == ["equal", "equal"]
    _, text = write(rows, tmp_path)
    assert "KL 0.820 and 0.700, single 420 nearer by 0.120, which a single seed cannot" in text
    assert "± 0" not in text


def test_below_fresh_points_is_no_better_than_above():
    rows = [
        with_kl("fresh", [-0.1, -0.1]),
        with_kl("dual", [-0.3, -0.3]),
        with_kl("single 420", [0.0, 0.0]),
    ]
    assert comparisons(rows, PAIRS)[0].gain == pytest.approx(0.1 - 0.2)
    assert nearest(rows).model == "single 420"
    # Without fresh points the target is 0.
    assert comparisons(rows[1:], PAIRS)[0].gain == pytest.approx(0 - 0.3)


def test_the_nearest_model_counts_both_directions():
    rows = [
        with_kl("fresh", [0.0, 0.0]),
        with_kl("narrow", [0.1, 0.1], reverse=(0.9, 0.9)),
        with_kl("even", [0.4, 0.4], reverse=(0.4, 0.4)),
        Row("s", "t", "unscored", None, None, [0], "", {}),
    ]
    assert nearest(rows).model == "even"
    assert nearest(rows[:1]) is None


def test_the_verdict_names_the_nearest_model_its_floors_and_every_pair(tmp_path):
    _, text = write(make_rows(tmp_path), tmp_path)
    assert "by KL(real || samples), nearer to fresh points 0, farther 1, not to be" in text
    assert (
        "dino, linear : single 420 comes nearest with KL 0.720 ± 0.028, reverse KL 0.930 ± 0.014 "
        "(fresh points KL -0.070 ± 0.014, reverse KL 0.070 ± 0.014; exact denoiser KL -0.040"
        in text
    )
    assert "dual (691,717) against single 420 (693,002): KL 0.850" in text
    assert "seeds 3 and 4" in text


@pytest.mark.parametrize(
    "models, words",
    [
        ([], "Nothing has been scored yet."),
        (["fresh"], "no model has been scored yet (fresh points KL -0.070"),
        (["baseline", "dual"], "dual against single 420: single 420 is not there yet"),
        (["single 420"], "dual against single 420: dual is not there yet"),
        (["single 420", "dual"], "(no fresh points; no exact denoiser)"),
        (["fresh", "baseline"], "No model can be compared with a control."),
    ],
)
def test_an_unfinished_table_gets_a_page_of_what_is_there(tmp_path, models, words):
    assert words in write(make_rows(tmp_path, models), tmp_path)[1]


# The table ----------------------------------------------------------------------------------------


def lines_of(html):
    """The cells of each line of the first table, by the name in its first one."""
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line) for line in table.split("</tr>")]
    return {re.sub(r"<.*?>", "", line[0]): line[1:] for line in cells if line}


def test_floors_come_first_and_the_nearest_to_fresh_points_is_bold(tmp_path):
    rows = make_rows(tmp_path)
    rows[-1].scores["KL"] = [-0.3, -0.3]  # nearer to -.07 than any other, and below
    rows[1].scores["KL"] = [-0.3, -0.3]  # a floor is never bold
    rows.append(rows.pop(0))
    lines = lines_of(write(rows, tmp_path)[0])
    assert list(lines) == ["fresh points", "exact denoiser", "baseline", "dual", "single 420"]
    bold = {name: [cell.startswith("<b>") for cell in line] for name, line in lines.items()}
    assert bold.pop("single 420") == [False, False, False, True, True]
    assert not any(any(line) for line in bold.values())
    assert lines["single 420"][:3] == ["693,002", "60", "2"]
    assert lines["dual"][3] == "0.850<small>± 0.042</small>"
    assert lines["fresh points"][:2] == ["-", "-"]


def test_only_scores_that_apply_are_columns_and_the_lowest_loss_is_bold(tmp_path):
    rows = make_rows(tmp_path)
    for row, loss in zip(rows[2:], (0.66, 0.65, 0.64)):
        row.scores["loss"] = [loss, loss]
    for row in (rows[0], *rows[2:]):
        row.scores["modes"] = [142, 142]
    for row, width in zip([rows[0], *rows[2:]], (1.0, math.nan, 2.0, 1.5)):
        row.scores["width"] = [width]
    rows[1].scores["sampling"] = [3.0, 3.0]  # of the exact denoiser alone
    html, text = write(rows, tmp_path)
    assert "evaluation loss" in text and "sliced W1" not in text
    lines = lines_of(html)
    assert lines["single 420"][3].startswith("<b>0.6400</b>")
    assert lines["fresh points"][3] == "-"
    bold = [cell for line in lines.values() for cell in line if cell.startswith("<b>")]
    assert not any("142" in cell or "-" in cell for cell in bold)  # all equal; not there
    assert [cell[3:8] for cell in bold if "1.500" in cell] == ["1.500"]


def test_schedules_are_compared_each_for_itself(tmp_path):
    rows = make_rows(tmp_path) + make_rows(tmp_path, ["dual"], schedule="cosine")
    html, text = write(rows, tmp_path)
    assert html.count("<table>") == 2
    assert re.findall("<h2>(.*?)</h2>", html)[:2] == ["dino, linear", "dino, cosine"]
    assert "farther 1, not to be told apart 0" in text
    assert "dual against single 420: single 420 is not there yet" in text


def test_the_page_needs_no_other_file_and_escapes_names(tmp_path):
    rows = make_rows(tmp_path)
    for row in rows:
        save_points(torch.randn(20, 2), tmp_path / "dino/linear" / row.model / "seed-3/samples.csv")
    Image.new("RGB", (4, 4)).save(tmp_path / "dino-linear.gif")
    Image.new("RGB", (4, 4)).save(tmp_path / "dino/linear/dual/seed-3/gates.png")
    html, text = write(rows, tmp_path)
    assert "A &lt;table&gt;" in html
    assert "data:image/gif;base64" in html and "From noise to samples" in text
    assert text.count("Gates of dual") == 1 and "Gates of baseline" not in text
    links = re.findall(r"(?:src|href|xlink:href)=\"(.*?)\"", html)
    assert links and all(link.startswith(("data:", "#")) for link in links)


# Pictures -----------------------------------------------------------------------------------------


def test_every_seed_is_a_dot_in_the_colour_of_its_kind(tmp_path):
    rows = make_rows(tmp_path)
    forward, backward = score_figure(rows, PAIRS).axes
    for axes, direction in ((forward, 0), (backward, 1)):
        dots = {}
        for line in axes.lines:
            if line.get_marker() == "o" and len(line.get_xdata()):
                y = set(line.get_ydata())
                dots[y.pop()] = (list(line.get_xdata()), to_hex(line.get_color()))
        colours = [BASELINE_COLOUR, EXPERT_COLOUR, BASELINE_COLOUR]
        models = ["baseline", "dual", "single 420"]
        expected = [(KL[m][direction], colour) for m, colour in zip(models, colours)]
        assert [dots[y] for y in range(3)] == expected
    assert [label.get_text().split()[0] for label in forward.get_yticklabels()] == [
        "baseline", "dual", "single",
    ]  # fmt: skip


def test_floors_are_bands_from_the_lowest_to_the_highest_seed(tmp_path):
    axes = score_figure(make_rows(tmp_path), PAIRS).axes[0]
    bands = {to_hex(p.get_facecolor()): p.get_extents() for p in axes.patches}
    for floor, colour in FLOOR_COLOURS.items():
        box = axes.transData.inverted().transform(bands[colour])
        assert box[:, 0] == pytest.approx(KL[floor][0])


def test_means_are_marked_and_joined_to_those_of_the_control_even_at_zero():
    rows = [
        with_kl("dual", [-0.1, 0.1]),
        Row("s", "t", "unscored", None, None, [0], "", {}),
        with_kl("single 420", [0.2, 0.4]),
    ]
    lines = score_figure(rows, PAIRS).axes[0].lines
    points = {kind: [line.get_xydata().tolist() for line in lines if line.get_marker() == kind
                     and len(line.get_xdata())] for kind in ("|", "None")}  # fmt: skip
    ends = [[0.0, 0], [pytest.approx(0.3), 2]]
    assert points == {"|": [[end] for end in ends], "None": [ends]}


def test_all_samples_stand_in_the_frame_of_fresh_points(tmp_path):
    rows = make_rows(tmp_path, ["dual", "exact", "fresh", "baseline"])
    clouds = {row.model: np.random.default_rng(i).normal(size=(30, 2)) * (i + 1)
              for i, row in enumerate(rows)}  # fmt: skip
    for row in rows[:3]:  # nothing on disk of the baseline
        save_points(clouds[row.model], tmp_path / "dino/linear" / row.model / "seed-3/samples.csv")
    panels = [axes for axes in samples_figure(rows).axes if axes.collections]
    assert [axes.get_title() for axes in panels] == [
        "fresh points\nKL -0.080, reverse 0.060",
        "exact denoiser\nKL -0.050, reverse 0.100",
        "dual\nKL 0.820, reverse 1.150",
    ]
    lo, hi = limits_of(clouds["fresh"])
    for axes in panels:
        assert [*axes.get_xlim(), *axes.get_ylim()] == pytest.approx([lo[0], hi[0], lo[1], hi[1]])
    np.testing.assert_allclose(panels[2].collections[0].get_offsets(), clouds["dual"], rtol=1e-7)
    assert samples_figure(rows[3:]) is None


def far(x, process):
    """The exact denoiser of one narrow Gaussian at (x, 0)."""
    centre = torch.tensor([[x, 0.0]])
    return ExactDenoiser(Mixture(centre, torch.ones(1), torch.full((2,), 0.1)), process)


def blue(image, half):
    """The mean column, from 0 to 1, of the dots in the left (0) or right (1) half."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    width = pixels.shape[1] // 2
    pixels = pixels[:, half * width : (half + 1) * width]
    columns = np.nonzero((pixels[..., 2] - pixels[..., 0]) > 100)[1]
    return columns.mean() / width


def test_an_animation_runs_from_one_noise_to_each_models_samples(tmp_path):
    process = DiscreteVP(LinearBetas(1e-4, 0.2), 60)
    path = tmp_path / "some.gif"
    animate({"left": far(-3, process), "right": far(3, process)}, DDPM(clip=False), path, 200)
    assert [file.name for file in tmp_path.iterdir()] == ["some.gif"]
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["loop"], gif.size[0]) == (30, 0, 440)
        first = gif.info["duration"]
        start = [blue(gif, half) for half in (0, 1)]
        gif.seek(29)
        assert gif.info["duration"] > 10 * first
        end = [blue(gif, half) for half in (0, 1)]
        assert gif.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    assert start[0] == pytest.approx(start[1], abs=0.02)
    assert end[0] < start[0] - 0.1 and end[1] > start[1] + 0.1


def test_a_short_chain_has_a_frame_a_state(tmp_path):
    process = DiscreteVP(LinearBetas(1e-4, 0.2), 60)
    animate({"one": far(0, process)}, DDIM(4, clip=False), tmp_path / "short.gif", 50)
    with Image.open(tmp_path / "short.gif") as gif:
        assert gif.n_frames == 5
