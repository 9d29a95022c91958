"""Data sets for recipes: scikit-learn's digits, torchvision's sets, a user's own npz file, chorales; one per file.

A recipe takes any object with tensors, or tuples of them, `.train` and `.test`, and `.validation` if it likes, for a
data set. To add one of images, subclass `ImageData` in a file of its own and say in `read` where its arrays come from.
"""

from pyrogaps.datasets.chorales import Chorales
from pyrogaps.datasets.digits import Digits
from pyrogaps.datasets.images import GreyImages, ImageData
from pyrogaps.datasets.npz import NPZ
from pyrogaps.datasets.vision import CIFAR10, MNIST, FashionMNIST

__all__ = ["CIFAR10", "MNIST", "NPZ", "Chorales", "Digits", "FashionMNIST", "GreyImages", "ImageData"]
