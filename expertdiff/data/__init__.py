"""Data sets; importing them here lets the command line find each by its bare class name."""

from expertdiff.data.base import Batch, Data
from expertdiff.data.densities import (
    Checkerboard,
    Circle,
    Density,
    Dino,
    Gaussians,
    Line,
    Moons,
    Picture,
    Pinwheel,
    PointsFile,
    Rings,
    Spirals,
)
from expertdiff.data.folder import ImageFolder
from expertdiff.data.generated import RealAndGenerated
from expertdiff.data.imagenet32 import ImageNet32
from expertdiff.data.images import CIFAR10, Digits, FashionMNIST, Images
from expertdiff.data.latents import DiffusersKL, Latents, Tiny, latents
from expertdiff.data.toys import Toy2D

__all__ = [
    "CIFAR10",
    "Batch",
    "Checkerboard",
    "Circle",
    "Data",
    "Density",
    "DiffusersKL",
    "Digits",
    "Dino",
    "FashionMNIST",
    "Gaussians",
    "ImageFolder",
    "ImageNet32",
    "Images",
    "Latents",
    "Line",
    "Moons",
    "Picture",
    "Pinwheel",
    "PointsFile",
    "RealAndGenerated",
    "Rings",
    "Spirals",
    "Tiny",
    "Toy2D",
    "latents",
]
