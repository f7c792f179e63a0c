"""The report, from two bundles' folders to its files."""

from dataclasses import asdict
from pathlib import Path

from expertdiff.analysis.consistency.likeness import Cosine, Distance
from expertdiff.analysis.consistency.pair import Pair
from expertdiff.analysis.consistency.picture import picture
from expertdiff.analysis.consistency.rows import compared, table
from expertdiff.bundle import Bundle, check_data
from expertdiff.data.base import Data
from expertdiff.diffusion.samplers import DDIM, Sampler
from expertdiff.evaluation.features import FeatureExtractor, Pixels
from expertdiff.evaluation.kinds import PointKind, kind
from expertdiff.files import replacing, writable, write_json
from expertdiff.methods.stitched import Evaluation


def consistency(
    a: Path,
    b: Path,
    samples: int = 1000,
    seed: int = 0,
    sampler: Sampler | None = None,
    feature: FeatureExtractor | None = None,
    edges: list[float] | None = None,
    data: Data | None = None,
    batch_size: int | None = None,
    output: Path | None = None,
) -> None:
    """Tell whether two bundles turn the same noise into the same samples, and where it is decided.

    Draws from A, from B, and from A with B in one interval of the chain at a time: sample i of each
    has the same noise and the same label. The interval that brings A nearest to B decides. Images
    are compared by the cosine of their features, less the mean of A's and B's, points by distance.
    The shuffled pairs are what to expect of unlike noise.

    Args:
        a: a bundle's folder.
        b: the folder of another bundle, of the same process and the same kind of data.
        samples: how many, at least 2.
        seed: sample i is a function of (seed, i).
        sampler: by default DDIM with 50 steps, which draws no noise of its own; what a sampler
            draws on its way is the same for all models.
        feature: of images: ``Pixels``, the default, or ``Inception``.
        edges: of the intervals, from 0 to 1; by default all edges of the two bundles, of which two
            single networks have none.
        data: also compare with the nearest training items of these data, and tell how near held-out
            items come; of latents, with the pictures that their folder has kept.
        batch_size: samples at a time; by default 64 images or 10,000 points.
        output: folder of ``consistency.json`` and ``consistency.png``; by default
            ``<a>/consistency``.
    """
    first, second = Bundle.load(a), Bundle.load(b)
    ours = kind(first.manifest["shared"]["data"])
    images = not isinstance(ours, PointKind)
    protocol = Evaluation(
        sampler or DDIM(clip=ours.bounded),
        samples=samples,
        seeds=(seed,),
        batch_size=ours.shown if batch_size is None else batch_size,
    )
    pair = Pair(first, second, protocol, edges)
    if not images and feature is not None:
        raise ValueError(
            f"feature {type(feature).__name__} is one of images, and {a} draws points: leave it out"
        )
    if feature is not None and feature.own_reference:
        raise ValueError(
            f"feature.reference {feature.own_reference} would not be looked at, because samples "
            "are compared with samples: leave feature.reference out"
        )
    training = searched = None
    if data is not None:
        identity = data.identity()
        check_data(first.folder, first.manifest["shared"]["data"], identity)
        training = data.real("train")
        searched = {"items": len(training), "of": identity["n"]}
    # Checks the extractor's weights before hours of sampling, not after.
    likeness = Cosine(feature or Pixels(), pair.device) if images else Distance()
    output = Path(output or Path(a) / "consistency")
    writable(output)

    drawn = {name: pair.draw(of_b) for name, of_b in pair.models.items()}
    rows = compared(pair, drawn, likeness, data, training)
    result = {
        **pair.description(),
        "feature": likeness.feature,
        "data": None if data is None else data.identity(),
        "searched": searched,
        "rows": [asdict(row) for row in rows],
    }
    write_json(output / "consistency.json", result)
    with replacing(output / "consistency.png") as temporary:
        picture(drawn, rows, likeness.feature).savefig(temporary, format="png")
    print(f"A: {a}\nB: {b}\nfeature: {likeness.feature}\n\n{table(rows)}")
    if searched is not None:
        print("nearest: of {items:,} of {of:,} training items".format(**searched))
    print(f"\nresults: {output / 'consistency.json'}, {output / 'consistency.png'}")
