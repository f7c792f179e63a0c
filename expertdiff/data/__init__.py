"""Data sets; importing them here lets the command line find each by its bare class name."""

from expertdiff.data.base import Batch, Data
from expertdiff.data.folder import ImageFolder
from expertdiff.data.images import CIFAR10, Digits, FashionMNIST, Images

__all__ = ["CIFAR10", "Batch", "Data", "Digits", "FashionMNIST", "ImageFolder", "Images"]
