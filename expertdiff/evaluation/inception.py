"""Images judged by the 2015 Inception: FID, sFID, KID, IS, precision and recall in one pass."""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertdiff.evaluation.cache import CACHE, Values, cached, digest_of
from expertdiff.evaluation.features import MANY, FeatureExtractor, check_shape, named, warn_of_few
from expertdiff.evaluation.fidelity import SPLITS, inception_score, kernel_distance
from expertdiff.evaluation.frechet import Statistics, frechet_distance
from expertdiff.evaluation.judge import Reference
from expertdiff.evaluation.manifold import (
    Distance,
    K,
    Manifold,
    adm_float16,
    euclidean,
    precision_recall,
)
from expertdiff.evaluation.network import download, load_network
from expertdiff.evaluation.reference import POOL, read_reference
from expertdiff.files import sha256_of

COMPARABLE = """\
Which number may be compared with whose. Every one depends on the number of samples: compare equal
numbers of samples against one reference set, and say both. "FID of 10,000 samples against 10,000
validation images" and "FID of 50,000 samples against the training set" are two quantities.
FID, KID and IS are torch-fidelity's (inception-v3-compat). FID and sFID are also those of ADM's
evaluator, and FID that of EDM, where the reference is the same file or the same images, neither
resized nor flipped. pytorch-fid and clean-fid's default resize in another way: never mix them in.
sFID is on Inception's spatial features (Mixed_6d, 7 channels); torch-fidelity has none. Precision
and recall are on pool_3 with k = 3, as ADM's, which rounds distances to float16 (adm_fp16 does so
too); programs that use VGG-16 give other numbers. Statistics files (mu, sigma) give FID, and sFID
where they hold mu_s and sigma_s; they tell nothing of KID, precision or recall. FD-pixels, the
distance of Pixels, is never FID and compares with nothing but itself."""


@dataclass(frozen=True, eq=False)
class Summary:
    """A set of images as Inception sees it; ``None`` where a statistics file holds less.

    Attributes:
        pool: statistics of pool_3.
        spatial: statistics of the spatial features.
        manifold: pool_3 of every image, as balls; ``None`` also of fewer than 4 images, or of more
            than 200,000, whose pairs would take hours.
        score: the Inception Score; ``None`` also of fewer than 10 images, or without classifier.
    """

    pool: Statistics
    spatial: Statistics | None = None
    manifold: Manifold | None = None
    score: float | None = None

    def values(self) -> Values:
        """All of it by name, to be kept on disk."""
        parts = {"pool": self.pool, "spatial": self.spatial, "manifold": self.manifold}
        values: Values = {} if self.score is None else {"score": self.score}
        for part, held in parts.items():
            if held is not None:
                values |= {f"{part}.{name}": value for name, value in vars(held).items()}
        return values

    @classmethod
    def of(cls, values: Values) -> "Summary":
        """The summary of `values`."""

        def part(name: str) -> dict[str, Any]:
            start = f"{name}."
            return {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}

        manifold = Manifold(**part("manifold")) if part("manifold") else None
        pool, spatial = Statistics(**part("pool")), Statistics(**part("spatial"))
        return cls(pool, spatial, manifold, values.get("score"))


class Inception(FeatureExtractor):
    """FID, sFID, KID, IS, precision and recall, by the 2015 Inception with its TF1 bilinear resize.

    The metrics of ADM's evaluator (Dhariwal and Nichol 2021), with torch-fidelity's port of its
    network. Features [B, 2048 + 2023]: pool_3, and the first 7 channels of Mixed_6d's 1x1 branch.
    Grey images become three equal channels. The network is loaded on first use and is no submodule:
    its weights never enter a checkpoint, an average or an optimizer.

    Args:
        weights: torch-fidelity's ``weights-inception-2015-12-05-*.pth``; without its classifier
            there is no IS; downloaded when None.
        reference: what samples are compared with, instead of the data's reference images: an
            ``.npz`` of images or statistics (ADM, EDM), or torch-fidelity's cached ``.pt``.
            Statistics alone give no KID, precision and recall. Set `reference` of the data to the
            split that the file was made of: the other one gives the floor.
        adm_fp16: round the distances of precision and recall to float16, as ADM's evaluator does.

    Raises:
        ValueError: `weights` or `reference` is no file; on first use: the weights are not this
            network's, or the download fails.
    """

    metric = "FID"
    keeps = True

    def __init__(
        self,
        weights: Path | None = None,
        reference: Path | None = None,
        adm_fp16: bool = False,
    ) -> None:
        super().__init__()
        self.weights = _file("weights", weights, "torch-fidelity's, or none to download them")
        self.file = _file("reference", reference, "an .npz or .pt, or none to use the data's own")
        self.adm_fp16 = adm_fp16

    @property
    def identity(self) -> str:
        rounding = ", float16 distances" if self.adm_fp16 else ""
        return f"{self._named('pool_3 and Mixed_6d')}{rounding}"

    @property
    def embedding_name(self) -> str:
        return self._named("pool_3")

    def _named(self, features: str) -> str:
        _, digest = self._loaded
        return f"inception-v3-compat {features}, TF1 bilinear to 299, weights sha256 {digest}"

    @property
    def own_reference(self) -> str:
        return "" if self.file is None else named(self.file)

    def extract(self, images: Tensor) -> Tensor:
        network, _ = self._loaded
        maps: list[Tensor] = []
        block = network.to(images.device).Mixed_6d.branch1x1
        with block.register_forward_hook(lambda *call: maps.append(call[-1][:, :7])):
            (pool,) = network(images.expand(-1, 3, -1, -1))
        # Channels last: the order of ADM's statistics files.
        return torch.cat([pool, maps[0].permute(0, 2, 3, 1).flatten(1)], dim=1)

    def embedding(self, features: Tensor) -> Tensor:
        """pool_3 [N,2048]."""
        return features[:, :POOL]

    def summary(self, features: Tensor) -> Summary:
        network, _ = self._loaded
        pool = features[:, :POOL].contiguous()
        return Summary(
            Statistics.of(pool),
            Statistics.of(features[:, POOL:]),
            Manifold.of(pool, self._distance) if K < len(pool) <= MANY else None,
            inception_score(pool, network.fc.weight),
        )

    def real(self, items: Tensor, device: torch.device) -> Summary:
        """Of real images, kept on disk: they are the same in every test."""
        values = cached(
            CACHE,
            lambda: self.summary(self.features(items, device)).values(),
            data_digest=digest_of(items),
            count=len(items),
            resolution=items.shape[-1],
            extractor=self.identity,
        )
        return Summary.of(values)

    def reference(self, name: str, items: Tensor, device: torch.device) -> Reference:
        if self.file is None:
            return super().reference(name, items, device)
        return self.read(self.file, items.shape[1:], device)

    def read(self, path: Path, shape: tuple[int, ...], device: torch.device) -> Reference:
        """See `FeatureExtractor.read`; also statistics, see `read_reference`.

        The statistics of a file that holds images too may be of more images than it holds, as
        ADM's are: they count for FID and sFID, the images for what is left.
        """
        images, pool, spatial = read_reference(path)
        if images is None:
            return Reference(Summary(pool, spatial), named(path), None)
        check_shape(path, images, shape)
        real = self.real(images, device)
        summary = replace(real, pool=pool or real.pool, spatial=spatial or real.spatial)
        return Reference(summary, named(path), summary.pool.count)

    def distances(self, samples: Summary, reference: Summary) -> dict[str, float]:
        """FID, and sFID, KID, IS, precision and recall as far as both summaries have them.

        Warns of those that are left out, and of fewer images than FID and sFID need.
        """
        if left_out := _left_out(samples, reference):
            warnings.warn(f"left out: {'; '.join(left_out)}", stacklevel=1)  # said once
        numbers = {}
        for name, part in (("FID", "pool"), ("sFID", "spatial")):
            ours, theirs = getattr(samples, part), getattr(reference, part)
            if theirs is not None:
                warn_of_few(name, ours, theirs)
                numbers[name] = frechet_distance(ours, theirs)
        if samples.score is not None:
            numbers["IS"] = samples.score
        ours, theirs = samples.manifold, reference.manifold
        if ours is not None and theirs is not None:
            numbers["KID"] = kernel_distance(ours.features, theirs.features)
            numbers |= precision_recall(ours, theirs, self._distance)
        return numbers

    @property
    def _distance(self) -> Distance:
        return adm_float16 if self.adm_fp16 else euclidean

    @cached_property
    def _loaded(self) -> tuple[nn.Module, str]:
        path = self.weights or download()
        return load_network(path), sha256_of(path)


def _file(argument: str, path: Path | None, expected: str) -> Path | None:
    file = None if path is None else Path(path).expanduser()
    if file is not None and not file.is_file():
        raise ValueError(f"{argument}={path} is not a file: give {expected}")
    return file


def _left_out(samples: Summary, reference: Summary) -> list[str]:
    """The numbers that two summaries do not give, and why."""
    reasons = {
        "sFID, which needs mu_s and sigma_s in a file of statistics": reference.spatial,
        f"IS, which needs {SPLITS} samples and weights with their classifier": samples.score,
        f"KID, precision and recall, which need {K + 1} to {MANY:,} images on both sides, not "
        "statistics": samples.manifold and reference.manifold,
    }
    return [reason for reason, held in reasons.items() if held is None]
