"""Scores of stitched models that share experts: what their chains share is sampled once."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from expertdiff.bundle import Expert, check_together, classes_of
from expertdiff.data.base import Data
from expertdiff.describe import describe
from expertdiff.devices import default_device
from expertdiff.diffusion.denoiser import Denoiser, Prediction
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.samplers import SampleNoise, State
from expertdiff.evaluation.cache import digest_of
from expertdiff.evaluation.kinds import kind
from expertdiff.experts.routed import RoutedExperts
from expertdiff.files import read_json, write_json
from expertdiff.methods.stitched import Evaluation, sample_labels
from expertdiff.networks.flow import of_flow

Mix = Sequence[Path]
"""Who serves each interval, cleanest first: a run's folder, a checkpoint or a bundle's file."""

LOW = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What autocast computes in; nothing else is cast."""

Scores = dict[str, list[float]]
"""Values of each distance, one a sampling seed; the headline first."""


class Mixer:
    """Scores any mix of experts on the intervals of one partition.

    Samples equal those of the stitched bundle bit for bit. Models are walked as the branches of a
    tree from the noise down: where two of them have the same experts, the chain is sampled once, so
    varying the cleanest expert costs its own calls only. Scores are kept on disk, by the digests of
    the weights and everything else they depend on.

    Args:
        partition: whose intervals are served.
        evaluation: how samples are drawn and judged.
        data: whose reference items they are compared with.
        scores: the file that keeps the scores.
        precision: of the networks, as the trainer names it.

    Raises:
        ValueError: an evaluation without a judge.
    """

    def __init__(
        self,
        partition: Partition,
        evaluation: Evaluation,
        data: Data,
        scores: Path,
        precision: str = "32-true",
    ) -> None:
        if evaluation.judge is None:
            raise ValueError("the evaluation has no judge: name one, for example Pixels")
        self.partition, self.evaluation, self.data = partition, evaluation, data
        self.scores, self.precision = scores, precision
        self.device = default_device()
        self._experts: dict[Path, Expert] = {}

    def score(self, mixes: Mapping[str, Mix]) -> dict[str, Scores]:
        """The distances of each mix, by its name.

        Raises:
            ValueError: experts that do not fit together or to the partition.
        """
        keys = {name: self._key(mix) for name, mix in mixes.items()}
        kept = read_json(self.scores) if self.scores.is_file() else {}
        new = {key: mixes[name] for name, key in keys.items() if key not in kept}
        if new:
            found = self._measured(new)
            # Read again: another verb may have measured meanwhile.
            kept = (read_json(self.scores) if self.scores.is_file() else {}) | kept | found
            write_json(self.scores, kept)
        return {name: kept[key] for name, key in keys.items()}

    def _key(self, mix: Mix) -> str:
        if len(mix) != len(self.partition):
            raise ValueError(
                f"{len(mix)} experts cannot serve the {len(self.partition)} intervals of "
                f"{self.partition}"
            )
        for path, interval in zip(mix, self.partition.intervals()):
            if not self._expert(path).interval.contains(interval):
                raise ValueError(
                    f"{path} was trained on {self._expert(path).interval}, it cannot serve "
                    f"{interval}: name another"
                )
        check_together([self._expert(path) for path in mix], allow_unfinished=True)
        content = [self._protocol, [self._expert(path).sha256 for path in mix]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _expert(self, path: Path) -> Expert:
        """What it is; its weights are read when they are needed, as there may be hundreds."""
        if path not in self._experts:
            expert = Expert.read(path)
            self._experts[path] = replace(expert, weights=of_flow(expert.weights))
        return self._experts[path]

    @cached_property
    def _protocol(self) -> dict[str, Any]:
        e, items = self.evaluation, self.data.real("reference")
        return {
            "partition": list(self.partition.edges),
            "sampler": describe(e.sampler),
            **({"guidance": describe(e.guidance)} if e.guidance else {}),
            "judge": e.judge.identity,
            "samples": e.samples,
            "seeds": list(e.seeds),
            "precision": self.precision,
            "reference": e.judge.own_reference or digest_of(items),
        }

    def _measured(self, mixes: dict[str, Mix]) -> dict[str, Scores]:
        e = self.evaluation
        e.judge.to(self.device)
        reference = e.judge.reference(self.data.reference, self.data.real("reference"), self.device)
        denoisers = self._denoisers(mixes)
        scores: dict[str, Scores] = {key: {} for key in mixes}
        for seed in e.seeds:
            features: dict[str, list[Tensor]] = {key: [] for key in mixes}
            batches = torch.arange(e.samples).split(e.batch_size)
            for index in tqdm(batches, desc=f"{len(mixes)} models, seed {seed}", leave=False):
                walk = Walk(self, denoisers, seed, index.tolist())
                for key, samples in walk.samples(mixes):
                    features[key].append(e.judge(samples))
            for key, parts in features.items():
                summary = e.judge.summary(torch.cat(parts))
                for name, value in e.judge.distances(summary, reference.summary).items():
                    scores[key].setdefault(name, []).append(value)
        return scores

    def _denoisers(self, mixes: dict[str, Mix]) -> dict[Path, Denoiser]:
        paths = dict.fromkeys(path for mix in mixes.values() for path in mix)
        experts = {path: Expert.read(path) for path in paths}
        return {
            path: self.evaluation.guided(e.denoiser(), e.identity["data"]).to(self.device)
            for path, e in experts.items()
        }


class Stretch(Denoiser):
    """An expert on one interval of a chain, as a stitched model has it there.

    Args:
        expert: who acts.
        partition: where samplers are told that there is a border.
        ahead: who is asked by a sampler that looks ahead.
    """

    def __init__(self, expert: Denoiser, partition: Partition, ahead: Denoiser) -> None:
        super().__init__()
        self.expert, self.partition, self.process = expert, partition, expert.process
        self._ahead = ahead

    @property
    def ahead(self) -> Denoiser:
        return self._ahead

    @property
    def flow(self) -> nn.Module | None:
        return self.expert.flow

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        return self.expert(x_t, t, y)


class Walk:
    """One batch of samples through all models of a tree.

    Args:
        mixer: whose protocol is followed.
        denoisers: of each expert.
        seed: of the samples.
        index: of the samples.
    """

    def __init__(
        self, mixer: Mixer, denoisers: dict[Path, Denoiser], seed: int, index: list[int]
    ) -> None:
        self.denoisers, self.partition = denoisers, mixer.partition
        self.sampler, self.low = mixer.evaluation.sampler, LOW.get(mixer.precision)
        identity = next(iter(mixer._experts.values())).identity
        self.kind = kind(identity["data"])
        self.noise = SampleNoise(seed, index, identity["data"]["shape"], mixer.device)
        first = next(iter(denoisers.values()))
        self.labels = sample_labels(classes_of(first), seed, index, mixer.device)
        visited = first.process.progress(self.sampler.visited(first.process))
        self.owners: list[int] = self.partition.index(visited).tolist()  # of each step

    def samples(self, mixes: dict[str, Mix]) -> list[tuple[str, Tensor]]:
        """The finished samples of every model."""
        return self._below(self.owners[0], mixes, None, None)

    def _below(
        self, level: int, mixes: dict[str, Mix], start: State | None, above: Path | None
    ) -> list[tuple[str, Tensor]]:
        """From a state at the noisy end of interval `level`, reached by `above`, to the data."""
        if level < 0:
            samples = self.kind.finished(start.x_t)
            return [(key, samples) for key in mixes]
        # No step may fall into an interval.
        following = max((owner for owner in self.owners if owner < level), default=-1)

        def who(mix: Mix) -> tuple[Path, Path]:
            """Whose steps these are, and of what lies below who has a say in them."""
            looks = self.sampler.looks_ahead and following >= 0
            return mix[level], mix[following] if looks else mix[level]

        ordered = sorted(mixes.items(), key=lambda item: tuple(map(str, who(item[1]))))
        found = []
        for (path, below), group in groupby(ordered, key=lambda item: who(item[1])):
            denoiser = self._stretch(level, path, above, below)
            state = self._through(level, denoiser, start)
            found += self._below(following, dict(group), state, path)
        return found

    def _stretch(self, level: int, path: Path, above: Path | None, below: Path) -> Denoiser:
        own, n = self.denoisers[path], len(self.partition)
        # Where another expert takes over, samplers are told that there is a border.
        border = Partition([0, 1]) if path == above else self.partition
        edges = Partition(sorted({*border.edges, *own.partition.edges}))
        ahead = [self.denoisers[below].ahead] * level + [own.ahead] * (n - level)
        return Stretch(own, edges, RoutedExperts(ahead, self.partition))

    def _through(self, level: int, denoiser: Denoiser, start: State | None) -> State:
        """The first state below interval `level`, or the samples."""
        device = self.noise.device
        with torch.autocast(device.type, self.low, enabled=self.low is not None):
            for state in self.sampler.trajectory(denoiser, self.noise, self.labels, start):
                if state.k == len(self.owners) or self.owners[state.k] < level:
                    break
        return state
