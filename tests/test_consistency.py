"""Same noise through two models: planted deciders, closed forms, brute force, refusals."""

from itertools import chain, combinations

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.spatial import cKDTree
from scipy.spatial.distance import cosine
from torch import nn

from expertdiff.analysis.consistency import consistency
from expertdiff.analysis.consistency.likeness import Cosine, Distance
from expertdiff.analysis.consistency.pair import Pair, swapped
from expertdiff.analysis.consistency.picture import picture
from expertdiff.analysis.consistency.rows import Row, table
from expertdiff.bundle import Bundle
from expertdiff.cli import run_verb
from expertdiff.data.images import Images
from expertdiff.describe import describe
from expertdiff.diffusion.denoiser import X0, Denoiser, Eps, Prediction
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP, LinearBetas
from expertdiff.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, SampleNoise
from expertdiff.evaluation.features import Pixels
from expertdiff.experts.routed import RoutedExperts
from expertdiff.files import Unusable, read_json, sha256_of, write_json
from expertdiff.image_files import to_uint8
from expertdiff.methods.stitched import Evaluation, Stitched
from expertdiff.networks.network import Network
from expertdiff.networks.unet import ADMUNet

SHAPE = (1, 8, 8)
HALVES = [0, 0.5, 1]
TWO = DDIM(2, clip=False)
"""Visits both ends of the chain: one step in each half."""


class Sign(Network):
    """Predicts x0 = w sign(x_t): every step decides the signs of the sample and its size anew."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x_t, t, y=None):
        return self.w * x_t.sign()


class Given(Images):
    """Images that are given."""

    shape = SHAPE

    def __init__(self, train, validation, flip=False):
        super().__init__(8, 8, "validation", flip)
        self.given = {"train": train, "validation": validation}

    def read(self, name):
        return self.given[name], torch.zeros(len(self.given[name]), dtype=torch.int64)


class Kept(Given):
    """Has kept the first 10 of its images to be looked at."""

    def real(self, name):
        return super().real(name)[:10]


class Halved(Pixels):
    """A stand-in for features that are part of what an extractor computes."""

    embedding_name = "the upper half"

    def embedding(self, features):
        return features[:, : features.shape[1] // 2]


def bundle(folder, weights, edges=(0, 1), shape=SHAPE, process=None, **init):
    """A bundle of `Sign`s with these w, cleanest first."""
    networks = []
    for w in weights:
        network = Sign(**init)
        network.w.data.fill_(w)
        networks.append(network)
    return written(folder, networks, edges, X0(), shape, process)


def unets(folder, seed, edges=(0, 1)):
    """A bundle of small networks with random weights."""
    torch.manual_seed(seed)
    networks = []
    for _ in edges[1:]:
        network = ADMUNet(8, 1, 8, 1, [1, 2], [4], num_head_channels=8)
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))  # no zeros at the output
        networks.append(network)
    return written(folder, networks, edges, Eps())


def written(folder, networks, edges, prediction, shape=SHAPE, process=None):
    folder.mkdir()
    experts = []
    for i, (network, *interval) in enumerate(zip(networks, edges, edges[1:])):
        file = folder / f"{i:02d}.safetensors"
        save_file(network.state_dict(), file)
        entry = {"interval": interval, "file": file.name, "sha256": sha256_of(file), "step": 1}
        experts.append(entry | {"identity": {"interval": interval}})
    scale = "[-1, 1] = uint8 / 127.5 - 1" if len(shape) == 3 else {"centre": [0, 0], "unit": 1}
    shared = {
        "process": describe(process or DiscreteVP(CosineBetas())),
        "prediction": describe(prediction),
        "network": describe(networks[0]),
        "data": {"shape": list(shape), "scale": scale},
    }
    manifest = {"format": 1, "partition": list(edges), "shared": shared, "experts": experts}
    write_json(folder / "manifest.json", manifest)
    return folder


def rows(folder):
    """The rows of a report by their names."""
    return {row["name"]: row for row in read_json(folder / "consistency.json")["rows"]}


def pair(a, b, samples=3, sampler=None, edges=None):
    protocol = Evaluation(sampler or DDIM(4), samples=samples, seeds=(0,), batch_size=2)
    return Pair(Bundle.load(a), Bundle.load(b), protocol, edges)


# Swapping -----------------------------------------------------------------------------------------


class Marked(Denoiser):
    """Says who it is."""

    process = DiscreteVP(LinearBetas(), T=100)

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def forward(self, x_t, t, y=None):
        return Prediction(x_t, torch.full_like(x_t, self.mark))


def routed(marks, edges):
    return RoutedExperts([Marked(mark) for mark in marks], Partition(edges))


@pytest.mark.parametrize("edges", [[0, 0.1, 0.5, 0.8, 1], [0, 0.3, 1], [0, 1]])
@pytest.mark.parametrize("ours", [routed([10, 11, 12], [0, 0.1, 0.8, 1]), Marked(10)])
def test_every_t_is_denoised_by_the_owner_in_its_interval(ours, edges):
    theirs, partition = routed([20, 21], HALVES), Partition(edges)
    t, x, numbers = torch.arange(100), torch.zeros(100, 1), range(len(partition))
    alone = {ours: ours(x, t).eps, theirs: theirs(x, t).eps}
    for of_b in chain.from_iterable(combinations(numbers, n) for n in range(len(partition) + 1)):
        said = swapped(ours, theirs, partition, of_b)(x, t).eps
        for k in t.tolist():
            interval = sum((k + 1) / 100 > edge for edge in edges[1:-1])
            assert said[k] == alone[theirs if interval in of_b else ours][k]


@pytest.mark.parametrize("edges", [None, [0, 0.3, 1]])
def test_edges_stay_where_the_owner_changes_only(edges):
    one, theirs = Marked(10), routed([20, 21], HALVES)
    ours = RoutedExperts([one, one, Marked(12)], Partition([0, 0.1, 0.8, 1]))
    partition = Partition(edges or [0, 0.1, 0.5, 0.8, 1])
    assert swapped(ours, theirs, partition, ()).partition == ours.partition
    assert swapped(ours, theirs, partition, range(len(partition))).partition == theirs.partition
    only_last = swapped(ours, theirs, partition, [len(partition) - 1]).partition.edges
    assert only_last == ((0, 0.3, 0.5, 1) if edges else (0, 0.8, 1))


@pytest.mark.parametrize("sampler", [DDIM(6), DDPM(6), DPMSolverPP2M(6, restart=True)])
def test_with_no_interval_of_b_it_is_a_and_with_all_b_bit_for_bit(tmp_path, sampler):
    ours = pair(
        unets(tmp_path / "a", 0), unets(tmp_path / "b", 1, [0, 0.4, 0.8, 1]), 2, sampler, HALVES
    )
    assert ours.models == {"A": [], "B": [0, 1], "A with B in (0, 0.5]": [0],
                           "A with B in (0.5, 1]": [1]}  # fmt: skip
    noise = SampleNoise(0, range(2), SHAPE, "cpu")
    for side, of_b in ((ours.a, []), (ours.b, [0, 1])):
        expected = to_uint8(sampler(side.denoiser, noise))
        assert torch.equal(ours.draw(of_b), expected)
    assert not torch.equal(ours.draw([0]), ours.draw([1]))


def test_intervals_are_those_of_both_bundles(tmp_path):
    a = bundle(tmp_path / "a", [1, 1, 1], [0, 0.1, 0.8, 1])
    b = bundle(tmp_path / "b", [1, 1], HALVES)
    assert pair(a, b).partition.edges == (0, 0.1, 0.5, 0.8, 1)
    assert pair(a, b, sampler=DDIM(1000)).calls() == [100, 400, 300, 200]
    assert list(pair(bundle(tmp_path / "c", [1]), bundle(tmp_path / "d", [1])).models) == ["A", "B"]


# The report ---------------------------------------------------------------------------------------


def test_the_interval_that_decides_is_found(tmp_path, capsys):
    # A: sign(noise). B's noisy expert turns every sign around, its clean one halves the size.
    a = bundle(tmp_path / "a", [1])
    b = bundle(tmp_path / "b", [0.5, -1], HALVES)
    consistency(a, b, samples=200, sampler=TWO)
    found = rows(a / "consistency")
    names = ["A", "B", "A with B in (0, 0.5]", "A with B in (0.5, 1]", "B, shuffled"]
    assert list(found) == names
    assert [found[name]["of_b"] for name in names] == [[], [0, 1], [0], [1], None]
    assert [found[name]["calls"] for name in names] == [0, 2, 1, 1, None]
    ours, theirs, clean, noisy, shuffled = found.values()
    assert ours["to_a"] == theirs["to_b"] == {"cosine": 1, "share > 0.6": 1, "MSE": 0}
    assert theirs["to_a"]["cosine"] < -0.99 and theirs["to_a"]["share > 0.6"] == 0
    assert clean["to_a"]["cosine"] > 0.99 and clean["to_b"]["cosine"] < -0.99
    assert noisy["to_b"]["cosine"] > 0.99 and noisy["to_a"]["cosine"] < -0.99
    # of pixels in [0, 1]: 1 and 0 against 1/4 and 3/4
    assert theirs["to_a"]["MSE"] == pytest.approx(0.75**2, rel=0.01)
    assert clean["to_a"]["MSE"] == pytest.approx(0.25**2, rel=0.02)
    assert abs(shuffled["to_a"]["cosine"]) < 0.05 and abs(shuffled["to_b"]["cosine"]) < 0.05
    assert shuffled["to_a"]["share > 0.6"] == 0
    said = capsys.readouterr().out
    assert "feature: pixels, 0 to 1; less the mean" in said and "consistency.json" in said
    with Image.open(a / "consistency/consistency.png") as image:
        assert image.width == 1100


def test_points_are_compared_by_their_distance(tmp_path):
    a = bundle(tmp_path / "a", [1], shape=(2,))
    b = bundle(tmp_path / "b", [0.5, -1], HALVES, shape=(2,))
    consistency(a, b, samples=400, sampler=TWO, output=tmp_path / "out")
    found = rows(tmp_path / "out")
    assert found["A"]["to_a"] == {"RMS distance": 0}
    for name, distance in (("B", 1.5), ("A with B in (0, 0.5]", 0.5), ("A with B in (0.5, 1]", 2)):
        assert found[name]["to_a"]["RMS distance"] == pytest.approx(distance * 2**0.5, rel=0.01)
    # signs of unlike noise differ in half of the coordinates: (1.5^2 + 0.5^2) / 2 a coordinate
    assert found["B, shuffled"]["to_a"]["RMS distance"] == pytest.approx(2.5**0.5, rel=0.05)
    assert read_json(tmp_path / "out/consistency.json")["feature"] == "coordinates"


def test_a_model_and_itself_are_exactly_alike(tmp_path):
    a, b = unets(tmp_path / "a", 0), unets(tmp_path / "b", 0)
    consistency(a, b, samples=7, sampler=DDIM(3), edges=HALVES, batch_size=3)
    found = rows(a / "consistency")
    for name in ("A", "B", "A with B in (0, 0.5]", "A with B in (0.5, 1]"):
        same = {"cosine": 1, "share > 0.6": 1, "MSE": 0}
        assert found[name]["to_a"] == found[name]["to_b"] == same
    # t = 999 and 500 are of the noisy half, 0 is of the clean one.
    assert [row["calls"] for row in found.values()] == [0, 3, 1, 2, None]


def test_samples_do_not_depend_on_how_many_are_drawn(tmp_path):
    a, b = bundle(tmp_path / "a", [1]), bundle(tmp_path / "b", [1])
    assert torch.equal(pair(a, b, 5).draw([]), pair(a, b, 9).draw([])[:5])


def test_the_feature_is_named_and_used(tmp_path, capsys, monkeypatch):
    a, b = bundle(tmp_path / "a", [1]), bundle(tmp_path / "b", [0.5])
    monkeypatch.setattr(Halved, "own_reference", "real.npz")
    with pytest.raises(ValueError, match="feature.reference real.npz .* leave feature.reference"):
        consistency(a, b, samples=3, sampler=TWO, feature=Halved())
    monkeypatch.undo()
    consistency(a, b, samples=3, sampler=TWO, feature=Halved())
    images = torch.randint(256, (250, *SHAPE), dtype=torch.uint8)
    features = Cosine(Halved(), torch.device("cpu")).features(images)
    assert torch.equal(features, images[:, :, :4].flatten(1) / 255)
    named = "the upper half; less the mean of A's and B's samples"
    assert read_json(a / "consistency/consistency.json")["feature"] == named
    assert f"feature: {named}" in capsys.readouterr().out


def test_shuffled_pairs_have_other_noise_and_the_same_label(tmp_path):
    plain = pair(bundle(tmp_path / "a", [1]), bundle(tmp_path / "b", [1]), 9)
    assert plain.shuffled().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]
    options = dict(num_classes=3)
    ours = pair(bundle(tmp_path / "c", [1], **options), bundle(tmp_path / "d", [1], **options), 200)
    labels = Stitched(ours.a.folder, ours.protocol).labels(0, torch.arange(200))
    other = ours.shuffled()
    assert sorted(other.tolist()) == list(range(200))
    assert (other != torch.arange(200)).all() and (labels[other] != labels).sum() == 3


# The nearest training item ------------------------------------------------------------------------


def test_copies_of_training_items_are_found_and_mirrored_ones(tmp_path):
    a, b = bundle(tmp_path / "a", [1]), bundle(tmp_path / "b", [0.5])
    learnt = pair(a, b, 20, TWO).draw([])
    fresh = torch.randint(256, (30, *SHAPE), dtype=torch.uint8)
    for train, flip, copied in ((learnt, False, 1), (learnt.flip(-1), True, 1),
                                (learnt.flip(-1), False, 0)):  # fmt: skip
        data = Given(torch.cat([fresh, train]), fresh[:10], flip)
        consistency(a, b, samples=20, sampler=TWO, data=data)
        found = rows(a / "consistency")
        nearest = found["A"]["nearest"]
        assert nearest["share > 0.6"] == copied
        assert (nearest["cosine"] == pytest.approx(1, abs=1e-5)) == copied
        assert found["held-out items"]["nearest"]["cosine"] == pytest.approx(1, abs=1e-5)
        assert found["held-out items"]["to_a"] == found["B, shuffled"]["nearest"] == {}
    assert read_json(a / "consistency/consistency.json")["data"] == data.identity()


def test_how_many_training_items_were_searched_is_told(tmp_path, capsys):
    a, b = bundle(tmp_path / "a", [1]), bundle(tmp_path / "b", [0.5])
    items = torch.randint(256, (1200, *SHAPE), dtype=torch.uint8)
    for data, n in ((Given(items, items), 1200), (Kept(items, items), 10)):
        consistency(a, b, samples=5, sampler=TWO, data=data)
        searched = read_json(a / "consistency/consistency.json")["searched"]
        assert searched == {"items": n, "of": 1200}
        assert f"nearest: of {n:,} of 1,200 training items" in capsys.readouterr().out
    consistency(a, b, samples=5, sampler=TWO)
    assert read_json(a / "consistency/consistency.json")["searched"] is None
    assert "nearest" not in capsys.readouterr().out


def test_the_nearest_is_that_of_brute_force():
    a, real = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (7, 23))
    parts = real.split(10)
    cosines = [max(1 - cosine(x, y) for y in real) for x in a]
    found = Cosine(Pixels(), torch.device("cpu")).nearest(a, parts)
    assert found.tolist() == pytest.approx(cosines, abs=1e-6)
    distances, _ = cKDTree(real).query(a)
    assert Distance().nearest(a, parts).tolist() == pytest.approx(distances, abs=1e-5)


def test_pairs_are_those_of_the_formula():
    a, b = (torch.randn(50, 6, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    cosines = nn.functional.cosine_similarity(a.double(), b.double())
    scores = Cosine(Pixels(), torch.device("cpu")).pairs(a, b)
    assert scores["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert scores["share > 0.6"] == (cosines > 0.6).double().mean().item() > 0
    assert scores["MSE"] == pytest.approx(((a - b) ** 2).mean().item())
    zero = torch.zeros(1, 6)
    assert Cosine(Pixels(), torch.device("cpu")).pairs(zero, a[:1])["cosine"] == 0
    assert Distance().pairs(torch.zeros(2, 2), torch.tensor([[3.0, 4], [0, 1]])) == {
        "RMS distance": pytest.approx(13**0.5)
    }


# Table and picture --------------------------------------------------------------------------------


def test_table_has_a_dash_where_nothing_applies():
    told = [
        Row("A", [], 0, {"x": 1.0, "y": 0.5}, {"x": 0.25, "y": 2.0}),
        Row("control", to_a={"x": 3.0, "y": 4.0}),
    ]
    head, first, second = table(told).splitlines()
    assert head.split("  ")[-1].strip() == "y to B" and len(head) == len(first) == len(second)
    assert first.split() == ["A", "0", "1.0000", "0.5000", "0.2500", "2.0000"]
    assert second.split() == ["control", "-", "3.0000", "4.0000", "-", "-"]


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("shape", [SHAPE, (3, 8, 8), (2,)])
def test_picture_has_a_panel_a_model(n, shape):
    kind = torch.uint8 if len(shape) == 3 else torch.float32
    sets = {f"model {i}": torch.full((20, *shape), i, dtype=kind) for i in range(n)}
    told = [Row(name, to_a={"x": 0.25}, to_b={"x": 0.5}) for name in [*sets, "control"]]
    figure = picture(sets, told, "a feature")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:n] == [f"{name}\nx 0.250 to A, 0.500 to B" for name in sets]
    assert not any(titles[n:]) and "a feature" in figure.get_suptitle()
    if len(shape) == 3:
        assert (figure.axes[1].images[0].get_array() == 1).all()
        assert figure.axes[1].images[0].get_array().shape == (8, 12 * 8, 3)


# Refusals -----------------------------------------------------------------------------------------


def test_the_command_line_takes_its_options(tmp_path, capsys):
    a, b = bundle(tmp_path / "a", [1]), bundle(tmp_path / "b", [1])
    options = [f"--b={b}", "--samples=4", "--edges=[0,0.5,1]", "--feature=Pixels"]
    options += ["--sampler=DDIM", "--sampler.steps=2", "--data=Digits"]
    run_verb(consistency, [str(a), *options])
    assert "held-out items" in capsys.readouterr().out
    found = read_json(a / "consistency/consistency.json")
    assert found["sampler"] == describe(DDIM(2)) and found["partition"] == [0, 0.5, 1]
    assert found["b"]["manifest_sha256"] == sha256_of(b / "manifest.json")


@pytest.mark.parametrize(
    "name, other",
    [
        ("shape", dict(shape=(1, 4, 4))),
        ("scale", dict(shape=(64,))),
        ("num_classes", dict(num_classes=3)),
        ("process.betas.class_path", dict(process=DiscreteVP(LinearBetas()))),
        ("process.T", dict(process=DiscreteVP(CosineBetas(), T=500))),
    ],
)
def test_bundles_of_other_samples_are_refused(tmp_path, name, other):
    a, b = bundle(tmp_path / "a", [1]), bundle(tmp_path / "b", [1], **other)
    with pytest.raises(ValueError, match=rf"a and .*b do not make samples of one kind.*{name}"):
        consistency(a, b)


@pytest.mark.parametrize(
    "said, options",
    [
        ("samples 1 cannot be shuffled", dict(samples=1)),
        ("do not partition", dict(edges=[0, 0.7, 0.5, 1])),
        ("batch_size 0 draws nothing", dict(batch_size=0)),
        (r"shape \[1, 8, 8\], these have \[1, 28, 28\]", dict(data="shape")),
    ],
)
def test_bad_options_are_refused_before_anything_is_drawn(tmp_path, said, options, monkeypatch):
    monkeypatch.setattr(Pair, "draw", lambda *_: pytest.fail("drawn"))
    if "data" in options:
        items = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
        options["data"] = Given(items, items)
        options["data"].shape = (1, 28, 28)
    with pytest.raises(ValueError, match=said):
        consistency(bundle(tmp_path / "a", [1]), bundle(tmp_path / "b", [1]), **options)
    assert not (tmp_path / "a/consistency").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(Pair, "draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(Unusable, match="/dev/null/x cannot be written"):
        consistency(bundle(tmp_path / "a", [1]), bundle(tmp_path / "b", [1]), output="/dev/null/x")


def test_points_have_no_features_and_are_not_clipped(tmp_path):
    a, b = (bundle(tmp_path / name, [1], shape=(2,)) for name in "ab")
    with pytest.raises(ValueError, match="feature Pixels is one of images, and .*a draws points"):
        consistency(a, b, feature=Pixels())
    with pytest.raises(ValueError, match="set clip to false"):
        consistency(a, b, sampler=DDIM())
