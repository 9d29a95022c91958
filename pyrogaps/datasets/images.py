"""`ImageData`: base class of image data sets, binarised and split into train, validation and test."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.settings import Count, Whole, checked_arguments, within

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Binarisation: TypeAlias = Literal["static", "stochastic", "continuous"]

# Images converted to floats at a time, to limit temporary memory.
BLOCK = 4096
# Each part has its own random stream.
PARTS = ("train", "test", "validation")


class GreyImages(NamedTuple):
    """Raw images, each array `(N, *image_shape)`: bytes from 0 to 255, bools, or floats from 0 to 1."""

    train: Array
    test: Array
    validation: Array | None = None


@dataclass(kw_only=True, eq=False)
class ImageData(ABC):
    """Images in `.train`, `.test` and optionally `.validation`: float tensors `(N, *image_shape)` from 0 to 1.

    Args:
        binarisation: "static" sets a pixel to 1 if its grey value g exceeds 1/2, "stochastic" draws each pixel
            once from Bernoulli(g), "continuous" keeps g. Colour images have one such value per channel.
        seed: of the stochastic draws; the draws of an image do not depend on the number of images.
        num_train: number of training images, from the first; None for all.
        num_validation: number of validation images; None for all that the set has, if any. If the set has none, they
            are the last training images.
        num_test: number of test images, from the first; None for all.

    Raises `InputError` for a setting out of range, and for files that cannot be used.
    """

    binarisation: Binarisation = "static"
    seed: Annotated[int, within("of at least 0 and below 4294967296")] = 0
    num_train: Count | None = None
    num_validation: Whole | None = None
    num_test: Count | None = None
    train: Tensor = field(init=False, repr=False)
    validation: Tensor | None = field(init=False, repr=False)
    test: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        vars(self).update(checked_arguments(type(self).__init__, vars(self), f"{self.name}."))
        grey = self._cut(self.read())
        self.train, self.test = self._pixels(grey.train, "train"), self._pixels(grey.test, "test")
        self.validation = None if grey.validation is None else self._pixels(grey.validation, "validation")

    @abstractmethod
    def read(self) -> GreyImages:
        """All images of the set; raises `InputError` if they cannot be read."""

    @property
    def name(self) -> str:
        """Name of the data set in messages."""
        return type(self).__name__

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image: `(height, width)`, or `(channels, height, width)` in colour."""
        return tuple(self.train.shape[1:])

    def _cut(self, grey: GreyImages) -> GreyImages:
        """The requested numbers of images."""
        train, test, validation = grey
        if validation is None and self.num_validation:
            if not 0 < self.num_validation < len(train):
                raise InputError(
                    f"{self.name}: num_validation must be from 0 to {len(train) - 1}, because validation images are "
                    f"taken from the {len(train)} training images; got {self.num_validation}"
                )
            train, validation = np.split(train, [len(train) - self.num_validation])
        if validation is not None:
            validation = None if self.num_validation == 0 else self._first("num_validation", validation)
        return GreyImages(self._first("num_train", train), self._first("num_test", test), validation)

    def _first(self, setting: str, images: Array) -> Array:
        number: int | None = getattr(self, setting)
        if number is not None and not 1 <= number <= len(images):
            raise InputError(f"{self.name}: {setting} must be from 1 to {len(images)}, got {number}")
        return images[:number]

    def _pixels(self, images: Array, part: str) -> Tensor:
        """`images`, binarised, as a float tensor of the same shape."""
        # NumPy guarantees a fixed stream for RandomState, but not for its newer generators.
        random = np.random.RandomState([self.seed, PARTS.index(part)])
        pixels = torch.empty(images.shape, dtype=torch.get_default_dtype())
        for start in range(0, len(images), BLOCK):
            block = grey_values(images[start : start + BLOCK])
            if self.binarisation == "static":
                block = block > 0.5
            elif self.binarisation == "stochastic":
                block = random.random_sample(block.shape) < block
            pixels[start : start + BLOCK] = torch.from_numpy(block)
        return pixels


def grey_values(images: Array) -> Array:
    """`images`, in a format of `GreyImages`, as floats from 0 to 1."""
    return images / 255.0 if images.dtype == np.uint8 else images.astype(np.float64)
