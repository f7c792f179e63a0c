"""Precision and recall, against torch-fidelity's, by hand and by brute force."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from expertdiff.evaluation import manifold
from expertdiff.evaluation.manifold import Manifold, adm_float16, euclidean, precision_recall


def features(n, dimensions, seed, scale=1.0):
    """As pool_3: at least 0, most of it small."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, dimensions, generator=generator).relu()


def ours(samples, reference, distance=euclidean):
    sets = (Manifold.of(x, distance) for x in (samples, reference))
    return precision_recall(*sets, distance)


@pytest.mark.parametrize("dimensions, scale", [(8, 1.1), (64, 0.97), (2048, 1.0)])
def test_precision_and_recall_are_torch_fidelitys(dimensions, scale):
    samples, reference = features(400, dimensions, 1, scale), features(500, dimensions, 2)
    found = ours(samples, reference)
    theirs = prc_features_to_metric(samples, reference, verbose=False)
    assert found == pytest.approx({name: theirs[name] for name in found}, abs=1e-6)
    # Else the comparison says nothing, not even which is which.
    assert 0 < found["precision"] != found["recall"] > 0


def test_a_ball_reaches_to_the_third_other_image_and_includes_its_border():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert Manifold.of(reference).radii.tolist() == [3, 2, 2, 3]
    samples = torch.tensor([[-3.0], [6.0], [6.5], [-3.5], [100.0]])
    # The samples' own balls: -3 reaches 9.5 far, 100 to 93.5.
    assert ours(samples, reference) == {"precision": 2 / 5, "recall": 1.0}


def test_a_set_against_itself_has_both_and_swapped_sets_swap_them():
    a, b = features(60, 16, 1), features(80, 16, 2, scale=1.2)
    assert ours(a, a.clone()) == {"precision": 1, "recall": 1}
    there, back = ours(a, b), ours(b, a)
    assert there["precision"] == back["recall"] and there["recall"] == back["precision"]


@pytest.mark.parametrize("spread", [0, 1e-3])
def test_a_collapsed_generator_is_precise_and_forgets(spread):
    reference = features(200, 64, 1)
    collapsed = reference[:1] + spread * features(100, 64, 2)
    found = ours(collapsed, reference)
    assert found["precision"] == 1 and found["recall"] <= 0.01


def test_blocks_change_nothing(monkeypatch):
    samples, reference = features(70, 32, 1), features(50, 32, 2)
    for distance in (euclidean, adm_float16):
        whole = ours(samples, reference, distance)
        monkeypatch.setattr(manifold, "ROWS", 7)
        assert ours(samples, reference, distance) == whole
        monkeypatch.undo()


def in_float16(a, b):
    """Squared distances by numpy's float16."""
    a, b = a.numpy().astype(np.float16), b.numpy().astype(np.float16)
    squares = [(x * x).sum(1, dtype=np.float32).astype(np.float16) for x in (a, b)]
    products = (a.astype(np.float64) @ b.T.astype(np.float64)).astype(np.float16)
    return np.maximum(squares[0][:, None] - np.float16(2) * products + squares[1], np.float16(0))


def test_adms_float16_rounds_as_it_did():
    samples, reference = features(400, 2048, 1), features(300, 2048, 2)
    found, expected = adm_float16(reference)(samples), in_float16(samples, reference)
    # Products are summed in another order: a few fall to the next float16, 2 apart here.
    assert (found.numpy() == expected).mean() > 0.99
    assert np.abs(found.numpy() - expected).max() <= 2
    exact = euclidean(reference)(samples).square()
    assert (found - exact).abs().max() > 0.5  # it is coarse
    moved = ours(samples, reference, adm_float16)
    assert moved == pytest.approx(ours(samples, reference), abs=0.02)


def test_what_overflows_float16_is_exact():
    samples, reference = features(60, 2048, 1, scale=20), features(50, 2048, 2, scale=20)
    exact = euclidean(reference)(samples).square().float()
    assert torch.equal(adm_float16(reference)(samples), exact)


def test_too_few_images_have_no_balls():
    with pytest.raises(ValueError, match="precision and recall of 3 images: give at least 4"):
        Manifold.of(features(3, 8, 1))
