"""The verb that compares files of images, whoever drew them."""

from pathlib import Path

from expertdiff.devices import default_device
from expertdiff.evaluation.features import FeatureExtractor, named
from expertdiff.files import write_json
from expertdiff.image_files import load_npz


def measure(
    samples: Path, reference: Path, judge: FeatureExtractor, output: Path | None = None
) -> None:
    """Compare drawn images with real ones, or with published statistics of real ones.

    Args:
        samples: an ``.npz`` in ADM's layout (`arr_0`, uint8 [N, H, W, C]), as `expertdiff sample`
            and ADM write it.
        reference: another ``.npz`` of images of the same resolution; for ``Inception`` also
            statistics (`mu`, `sigma`) of ADM, EDM or torch-fidelity.
        judge: by what: ``Inception`` (FID, sFID, KID, IS, precision, recall), or ``Pixels``.
        output: JSON file; by default beside the samples.
    """
    if judge.own_reference:
        raise ValueError(
            f"judge.reference {judge.own_reference} would not be looked at, because --reference "
            "says what the samples are compared with: leave judge.reference out"
        )
    device = default_device()
    samples, reference = Path(samples), Path(reference)
    images, _ = load_npz(samples)
    judge = judge.to(device)
    against = judge.read(reference, tuple(images.shape[1:]), device)
    drawn = judge.summary(judge.features(images, device))
    distances = judge.distances(drawn, against.summary)
    output = output or samples.with_suffix(".json")
    result = {
        "metric": judge.metric,
        "distances": distances,
        "samples": len(images),
        "file": named(samples),
        "reference": against.name,
        "reference_samples": against.count,
        "extractor": judge.identity,
    }
    write_json(Path(output), result)
    for name, value in distances.items():
        print(f"{name:<10}{value:>12.5g}")
    print(f"{len(images)} images of {samples} against {against.text}\nresults: {output}")
