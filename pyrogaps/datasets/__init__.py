"""Data sets for recipes: scikit-learn's digits, torchvision's image sets, npz files, chorales; one per file.

A recipe accepts any object with attributes `.train`, `.test` and optionally `.validation`, each a tensor or a tuple of
tensors. To add a set of images, subclass `ImageData` and load the arrays in `read`.
"""

from pyrogaps.datasets.chorales import Chorales
from pyrogaps.datasets.digits import Digits
from pyrogaps.datasets.images import GreyImages, ImageData
from pyrogaps.datasets.npz import NPZ
from pyrogaps.datasets.vision import CIFAR10, MNIST, FashionMNIST

__all__ = ["CIFAR10", "MNIST", "NPZ", "Chorales", "Digits", "FashionMNIST", "GreyImages", "ImageData"]
