"""KID and the Inception Score, by torch-fidelity's own functions with fixed seeds."""

from torch import Tensor

SUBSET, SUBSETS, SPLITS, SEED = 1000, 100, 10, 2020
"""Images of a subset and subsets of KID, splits of IS, seed of both: torch-fidelity's defaults."""


def kernel_distance(samples: Tensor, reference: Tensor) -> float:
    """KID (Binkowski et al. 2018, arXiv:1801.01401) of features [N, D] and [M, D], unbiased.

    The mean over 100 subsets of 1,000 images, or of the smaller set's number; it may fall below 0.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(SUBSET, len(samples), len(reference))
    settings = dict(kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=SEED, verbose=False)
    return kid_features_to_metric(samples, reference, **settings)[KEY_METRIC_KID_MEAN]


def inception_score(pool: Tensor, classifier: Tensor) -> float | None:
    """The Inception Score (Salimans et al. 2016, arXiv:1606.03498), mean over 10 splits.

    ``None`` of fewer than 10 images, or where the classifier is not there (all zeros).

    Args:
        pool: pool_3 [N, D].
        classifier: its weights [classes, D]; its bias is left out, as in the original.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    if len(pool) < SPLITS or not classifier.any():
        return None
    logits = pool.cpu().double() @ classifier.cpu().double().T
    return isc_features_to_metric(logits, SPLITS, True, SEED)[KEY_METRIC_ISC_MEAN]
