"""Finished experts on disk as one model: stitched from training runs, verified, pickle-free.

A bundle is a folder: ``manifest.json`` (what it is), ``config.yaml`` (how to test it) and one
``NN.safetensors`` an expert. Loading it needs torch and safetensors, not lightning.
"""

from expertdiff.bundle.bundle import Bundle, check_output, classes_of
from expertdiff.bundle.expert import Expert, check_data, check_together
from expertdiff.bundle.files import read_manifest
from expertdiff.bundle.merging import Merger

__all__ = [
    "Bundle",
    "Expert",
    "Merger",
    "check_data",
    "check_output",
    "check_together",
    "classes_of",
    "read_manifest",
]
