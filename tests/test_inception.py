"""The judge of images: torch-fidelity's numbers in one pass, and what they are comparable with."""

import hashlib
import io
import os
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from expertdiff.describe import build, describe
from expertdiff.evaluation import inception as module
from expertdiff.evaluation.fidelity import inception_score, kernel_distance
from expertdiff.evaluation.frechet import Statistics
from expertdiff.evaluation.inception import COMPARABLE, Inception, Summary
from expertdiff.evaluation.judge import Judge
from expertdiff.evaluation.manifold import adm_float16, euclidean
from expertdiff.image_files import save_npz

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the covariance is singular"),
    pytest.mark.filterwarnings("ignore:left out"),
]


class Bomb:
    """Unpickling this leaves a mark on the disk."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


class Projected(Inception):
    """A random projection of the pixels in the place of the network."""

    _loaded = (SimpleNamespace(fc=SimpleNamespace(weight=torch.eye(7, 2048))), "none")

    def extract(self, images):
        generator = torch.Generator().manual_seed(0)
        pixels = images.flatten(1).float() / 255
        return pixels @ torch.randn(pixels.shape[1], 2048 + 2023, generator=generator)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def fid(x, y):
    """torch-fidelity's number, quickly: a rotation into the span of the features changes none."""
    basis, _ = np.linalg.qr(torch.cat([x, y]).double().T.numpy())
    ours = (
        fid_features_to_statistics(torch.from_numpy(z.double().numpy() @ basis)) for z in (x, y)
    )
    return fid_statistics_to_metric(*ours, verbose=False)["frechet_inception_distance"]


def theirs(network, x):
    """pool_3, spatial features (height, width, channel) and logits of torch-fidelity's network."""
    maps = []
    keep = network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: maps.append(out))
    pool, logits = network(x)
    keep.remove()
    return pool, maps[0].permute(0, 2, 3, 1)[..., :7].flatten(1), logits


def numbers(samples, reference):
    """Those of torch-fidelity, of what `theirs` gives."""
    size = min(1000, len(samples[0]), len(reference[0]))
    prc = prc_features_to_metric(samples[0], reference[0], verbose=False)
    kid = kid_features_to_metric(samples[0], reference[0], kid_subset_size=size, verbose=False)
    return {
        "FID": fid(samples[0], reference[0]),
        "sFID": fid(samples[1], reference[1]),
        "IS": isc_features_to_metric(samples[2])["inception_score_mean"],
        "KID": kid["kernel_inception_distance_mean"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }


def untrained_inception():
    """torch-fidelity's own network with random weights and running statistics."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048", "logits_unbiased"], nothing)
    for name, weight in network.state_dict().items():
        if "conv" in name:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
        elif weight.ndim == 1:
            weight.uniform_(0.5, 1.5)
    return network


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A network, its weights, and our judge of the file of these."""
    network = untrained_inception()
    path = tmp_path_factory.mktemp("weights") / "untrained.pth"
    torch.save(network.state_dict(), path)
    return network, network.state_dict(), Inception(str(path))


# Against torch-fidelity ---------------------------------------------------------------------------


def test_one_pass_gives_torch_fidelitys_numbers(untrained):
    network, _, inception = untrained
    x = images(15, 3, 32, 32) // torch.arange(1, 16)[:, None, None, None].to(torch.uint8)
    passes = []
    with inception._loaded[0].register_forward_hook(lambda *_: passes.append(1)):
        found = inception(x)
        summaries = [inception.summary(part) for part in found.split([11, 4])]
        ours = inception.distances(*summaries)
    assert len(passes) == 1
    pool, spatial, logits = theirs(network, x)
    assert found.shape == (15, 2048 + 2023) and found.dtype == torch.float32
    for part, expected in ((found[:, :2048], pool), (found[:, 2048:], spatial)):
        assert (part - expected).abs().max() < 1e-4 * expected.abs().max()
        # Else the random network forgot its input, and the comparison says nothing.
        assert expected.std(0).mean() > 1e-2 * expected.abs().max()
    expected = numbers(*zip(*(part.split([11, 4]) for part in (pool, spatial, logits))))
    assert list(ours) == ["FID", "sFID", "IS", "KID", "precision", "recall"]
    assert ours == pytest.approx(expected, rel=1e-3)
    assert ours["IS"] - 1 == pytest.approx(expected["IS"] - 1, rel=1e-3) and ours["IS"] > 1.001
    assert ours["precision"] != ours["recall"]


def test_numbers_of_equal_features_are_torch_fidelitys():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 2048, generator=generator).relu() for n in (60, 50))
    weight = torch.randn(1008, 2048, generator=generator) / 8
    kid = kid_features_to_metric(x, y, kid_subset_size=50, verbose=False)
    assert kernel_distance(x, y) == kid["kernel_inception_distance_mean"]
    score = isc_features_to_metric(x @ weight.T)["inception_score_mean"]
    assert inception_score(x, weight) == pytest.approx(score, rel=1e-6) and score > 2


def test_real_images_give_torch_fidelitys_numbers():
    folder = os.environ.get("EXPERTDIFF_DATA")
    if folder is None:
        pytest.skip("EXPERTDIFF_DATA names no folder with CIFAR-10 and Inception weights")
    weights = next(Path(folder).glob("weights-inception-2015-12-05-*.pth"))
    raw = np.fromfile(Path(folder, "cifar-10-batches-bin", "test_batch.bin"), np.uint8, 40 * 3073)
    x = torch.from_numpy(raw.reshape(40, 3073)[:, 1:].reshape(40, 3, 32, 32).copy())
    inception = Inception(weights)
    network = FeatureExtractorInceptionV3("stock", ["2048", "logits_unbiased"], str(weights))
    found, (pool, spatial, logits) = inception(x), theirs(network, x)
    assert (found[:, :2048] - pool).abs().max() < 1e-4
    assert (found[:, 2048:] - spatial).abs().max() < 1e-4
    halves = [inception.summary(half) for half in found.split(20)]
    expected = numbers(*zip(*(part.split(20) for part in (pool, spatial, logits))))
    ours = inception.distances(*halves)
    if not network.fc.weight.any():
        expected.pop("IS")  # a file for FID, without the classifier
    # Every pool_3 feature counts in FID: torch-fidelity's own way, without a rotation.
    parts = (fid_features_to_statistics(half) for half in pool.split(20))
    whole = fid_statistics_to_metric(*parts, verbose=False)["frechet_inception_distance"]
    assert ours["FID"] == pytest.approx(whole, abs=1e-3)
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(expected[name], abs=1e-6)
    assert ours == pytest.approx(expected, abs=1e-3)


# The judge ----------------------------------------------------------------------------------------


def test_grey_images_are_three_equal_channels(untrained):
    _, _, inception = untrained
    grey = images(2, 1, 16, 16)
    found = inception(grey)
    assert torch.equal(found, inception(grey.repeat(1, 3, 1, 1)))
    assert torch.equal(inception.embedding(found), found[:, :2048])
    assert inception.metric == "FID" and len(inception.state_dict()) == 0


def test_equal_sets_are_at_zero_and_a_collapsed_generator_forgets():
    inception = Projected()
    real = inception(images(40, 3, 8, 8))
    reference = inception.summary(real)
    same = inception.distances(inception.summary(real.clone()), reference)
    assert 0 <= same["FID"] < 1e-6 and 0 <= same["sFID"] < 1e-6
    assert same["precision"] == same["recall"] == 1 and same["KID"] <= 1e-3
    collapsed = inception.distances(inception.summary(real[:1].expand(30, -1)), reference)
    assert collapsed["FID"] > 100 and collapsed["sFID"] > 100 and collapsed["KID"] > 0.1
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.1
    assert collapsed["IS"] == pytest.approx(1)


def told(inception, samples, reference):
    """The names of the numbers, and what is said of others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        numbers = inception.distances(samples, reference)
    said = [str(warning.message) for warning in caught]
    (left_out,) = [text for text in said if text.startswith("left out")] or [""]
    return set(numbers), left_out


def test_sets_too_small_for_a_number_go_without_it_and_say_so():
    inception = Projected()
    x, y = inception(images(50, 3, 8, 8)), inception.summary(inception(images(9, 3, 8, 8, seed=1)))
    many, few = inception.summary(x), inception.summary(x[:3])
    everything = {"FID", "sFID", "IS", "KID", "precision", "recall"}
    assert told(inception, many, y) == (everything, "")
    numbers, left_out = told(inception, y, many)
    assert numbers == everything - {"IS"}
    assert left_out == "left out: IS, which needs 10 samples and weights with their classifier"
    numbers, left_out = told(inception, many, few)
    assert numbers == {"FID", "sFID", "IS"}
    missing = "left out: KID, precision and recall, which need 4 to 200,000 images on both sides"
    assert left_out.startswith(missing)
    numbers, left_out = told(inception, few, Summary(y.pool))
    assert numbers == {"FID"}
    assert all(
        name in left_out for name in (": sFID, which needs mu_s and sigma_s", "; IS", "; KID")
    )


def test_sets_too_large_for_pairs_go_without_them_and_say_so(monkeypatch):
    inception, x = Projected(), images(30, 3, 8, 8)
    monkeypatch.setattr(module, "MANY", 20)
    many, few = (inception.summary(inception(part)) for part in (x[:21], x[:20]))
    assert many.manifold is None and len(few.manifold.features) == 20
    numbers, left_out = told(inception, few, many)
    assert numbers == {"FID", "sFID", "IS"}
    assert "KID, precision and recall, which need 4 to 20 images on both sides" in left_out


def test_weights_without_classifier_give_no_inception_score(untrained, tmp_path):
    _, weights, inception = untrained
    fid_only = {name: w for name, w in weights.items() if not name.startswith("fc.")}
    torch.save(fid_only, tmp_path / "nofc.pth")
    features = torch.randn(12, 2048 + 2023, generator=torch.Generator().manual_seed(0))
    summary, without = inception.summary(features), Inception(tmp_path / "nofc.pth")
    assert summary.score > 1 and without.summary(features).score is None
    assert "IS, which needs" in told(without, without.summary(features), summary)[1]


@pytest.fixture
def counted(monkeypatch):
    """Makes summaries of so many images, whose distances cost nothing."""
    monkeypatch.setattr(module, "frechet_distance", lambda *_: 0.0)
    zeros = (torch.zeros(d, dtype=torch.float64).expand(d, d) for d in (2048, 2023))
    parts = [(cov[0], cov) for cov in zeros]
    return lambda count: Summary(*(Statistics(*part, count) for part in parts))


@pytest.mark.parametrize(
    "samples, reference, warned",
    [
        (2049, 3000, []),
        (3000, None, []),
        (2048, None, ["FID of 2048 samples against statistics: below 2049"]),
        (3000, 2048, ["FID of 3000 samples against 2048 images"]),
        (2024, 5000, ["FID of 2024"]),
        (2023, 5000, ["FID of 2023", "sFID of 2023 samples against 5000 images: below 2024"]),
    ],
)
def test_too_few_images_are_warned_of_and_named(counted, samples, reference, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Inception().distances(counted(samples), counted(reference))
    said = [str(w.message) for w in caught if not str(w.message).startswith("left out")]
    assert len(said) == len(warned)
    assert all(message.startswith(text) for message, text in zip(said, warned))


def test_warnings_are_said_once(counted):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own, without pytest's
        for _ in range(3):
            Inception().distances(counted(500), counted(None))
    assert len(caught) == 3  # FID, sFID, what is left out


def test_adms_float16_is_another_number_with_another_name():
    plain, adm = Projected(), Projected(adm_fp16=True)
    assert plain.identity != adm.identity and "float16" in adm.identity
    # It does not touch what single images are compared by.
    assert plain.embedding_name == adm.embedding_name and "pool_3, " in adm.embedding_name
    x = plain(images(30, 3, 8, 8))
    for judge, distance in ((plain, euclidean), (adm, adm_float16)):
        radii = distance(x[:, :2048])(x[:, :2048]).sort(1).values[:, 3]
        assert torch.equal(judge.summary(x).manifold.radii, radii)
    assert describe(build(describe(adm), Judge)) == describe(adm)


def test_the_page_of_help_names_every_number():
    for name in ("FID", "sFID", "KID", "IS", "Precision", "FD-pixels", "clean-fid"):
        assert name in COMPARABLE
    assert max(map(len, COMPARABLE.splitlines())) <= 100


# The reference ------------------------------------------------------------------------------------


def test_real_images_are_looked_at_once_and_not_kept(cache, monkeypatch):
    inception, x = Projected(), images(120, 3, 8, 8)
    first = inception.real(x, CPU)
    monkeypatch.setattr(Inception, "features", None)  # would fail
    again = inception.real(x, CPU)
    a, b = first.values(), again.values()
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert again.score == first.score and again.pool.count == 120
    assert inception.distances(again, first)["recall"] == 1
    (file,) = cache.iterdir()
    with np.load(file, allow_pickle=False) as kept:
        assert kept["manifold.features"].dtype == np.float32
        assert all(kept[name].dtype != np.uint8 for name in kept)
    with pytest.raises(TypeError):
        inception.real(x.flip(0), CPU)


def test_a_set_that_is_split_into_batches_is_the_same_set():
    inception, x = Projected(), images(230, 3, 4, 4)
    assert torch.equal(inception.features(x, CPU), torch.cat([inception(p) for p in x.split(100)]))


def test_a_file_of_images_takes_the_place_of_the_datas_own(tmp_path):
    x, own = images(20, 3, 8, 8, seed=1), images(30, 3, 8, 8)
    save_npz(x, tmp_path / "ref.npz")
    against = Projected(reference=tmp_path / "ref.npz").reference("validation", own, CPU)
    digest = hashlib.sha256((tmp_path / "ref.npz").read_bytes()).hexdigest()
    assert against.name == f"ref.npz, sha256 {digest[:12]}" and against.count == 20
    assert torch.equal(against.summary.pool.mean, Projected().real(x, CPU).pool.mean)
    assert Projected(reference=tmp_path / "ref.npz").own_reference == against.name
    save_npz(own, tmp_path / "ref.npz")
    assert Projected(reference=tmp_path / "ref.npz").own_reference not in ("", against.name)
    none = Projected().reference("validation", own, CPU)
    assert Projected().own_reference == ""
    assert none.name == "validation" and none.count == none.summary.pool.count == 30


def test_a_reference_of_another_resolution_is_refused(tmp_path):
    save_npz(images(5, 3, 16, 16), tmp_path / "ref.npz")
    judge = Projected(reference=tmp_path / "ref.npz")
    with pytest.raises(ValueError, match=r"ref.npz .*\[3, 16, 16\].*samples are \[3, 8, 8\]"):
        judge.reference("validation", images(5, 3, 8, 8), CPU)


def test_adms_file_gives_its_own_statistics_and_the_rest_of_its_images(tmp_path):
    x, mu = images(20, 3, 8, 8), np.full(2048, 3.0)
    nhwc = x.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", arr_0=nhwc, mu=mu, sigma=np.eye(2048))
    inception = Projected()
    against = inception.read(tmp_path / "adm.npz", (3, 8, 8), CPU)
    own = inception.real(x, CPU)
    assert against.count is None and (against.summary.pool.mean == 3).all()
    assert torch.equal(against.summary.spatial.cov, own.spatial.cov)
    found = inception.distances(own, against.summary)
    assert found["precision"] == found["recall"] == 1 and found["sFID"] < 1e-6 < found["FID"]


# The weights --------------------------------------------------------------------------------------


def test_inceptions_identity_names_its_weights(untrained, tmp_path):
    _, weights, inception = untrained
    assert hashlib.sha256(inception.weights.read_bytes()).hexdigest() in inception.identity
    name = "Mixed_7c.branch_pool.bn.bias"
    torch.save({**weights, name: weights[name] + 1}, tmp_path / "other.pth")
    assert inception.identity != Inception(tmp_path / "other.pth").identity


def test_inception_refuses_other_weights(untrained, tmp_path):
    _, weights, _ = untrained
    name = "Mixed_7c.branch_pool.bn.bias"
    missing = {key: weight for key, weight in weights.items() if key != name}
    wrong = {
        "not finite": {**weights, name: weights[name] * float("nan")},
        f'Missing key.*"{name}"': missing,
        "Unexpected key": {**weights, "extra": torch.zeros(1)},
        "size mismatch": {**weights, name: torch.zeros(7)},
        "no state dict": [1, 2],
        "no state dict of tensors": {"model": dict(weights=torch.zeros(1))},
    }
    path = tmp_path / "wrong.pth"
    for reason, content in wrong.items():
        torch.save(content, path)
        inception = Inception(path)
        with pytest.raises(ValueError, match=reason) as raised:
            inception.identity  # noqa: B018
        assert "wrong.pth" in str(raised.value) and "\n" not in str(raised.value)


def test_inception_refuses_damaged_and_absent_files(tmp_path):
    path = tmp_path / "cut.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for size in (0, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.pth cannot be loaded"):
            Inception(path)(images(1, 3, 8, 8))
    with pytest.raises(ValueError, match="weights=.*absent.pth is not a file"):
        Inception(tmp_path / "absent.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_inception_executes_nothing_of_a_malicious_file(tmp_path, zipped):
    bomb = Bomb(tmp_path / "mark")
    torch.save({"a": bomb}, tmp_path / "bomb.pth", _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(tmp_path / "bomb.pth") == zipped
    with pytest.raises(ValueError, match="never run"):
        Inception(tmp_path / "bomb.pth").identity  # noqa: B018
    assert not (tmp_path / "mark").exists()


def test_inception_without_internet_names_the_file_and_the_argument(tmp_path, monkeypatch):
    def offline(url, destination):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    inception = Inception()
    with pytest.raises(ValueError, match=r"weights-inception-2015-12-05.*argument weights"):
        inception(images(1, 3, 8, 8))
