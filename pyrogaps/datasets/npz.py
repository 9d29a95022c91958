"""Images in a NumPy archive."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from pyrogaps.datasets.folder import locate, reading
from pyrogaps.datasets.images import Array, GreyImages, ImageData
from pyrogaps.errors import InputError


@dataclass(kw_only=True, eq=False)
class NPZ(ImageData):
    """Images in an npz file written by `np.savez("mine.npz", train=..., test=...)`.

    An array is `(N, *image_shape)` and holds integers from 0 to 255, zeros and ones (of any type), or floats from
    0 to 1.

    Args:
        path: the file, relative to the current folder or else to the data folder.
        train_key: name of the training images in the file.
        test_key: name of the test images.
        validation_key: name of the validation images; None if the file has none.
        channels_last: whether the file stores images as `(height, width, channels)`; tensors are channels first.
        data_root: the data folder; None uses the environment variable PYROGAPS_DATA.
    """

    path: str
    train_key: str = "train"
    test_key: str = "test"
    validation_key: str | None = None
    channels_last: bool = False
    data_root: str | None = None

    def read(self) -> GreyImages:
        path = locate(self.name, self.path, self.data_root)
        with reading(self.name, path, "Check that the file is complete and npz."), path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it contains a single array without a name")
            train, test = self._array(path, file, self.train_key), self._array(path, file, self.test_key)
            validation = None if self.validation_key is None else self._array(path, file, self.validation_key)
        for key, images in ((self.test_key, test), (self.validation_key, validation)):
            if images is not None and images.shape[1:] != train.shape[1:]:
                raise InputError(
                    f"{self.name}: {path}: images in '{key}' have shape {images.shape[1:]}, but those in "
                    f"'{self.train_key}' have shape {train.shape[1:]}. All images must have the same shape."
                )
        return GreyImages(train, test, validation)

    def _array(self, path: Path, file: "np.lib.npyio.NpzFile", key: str) -> Array:
        if key not in file.files:
            near = get_close_matches(key, file.files, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Its arrays: {', '.join(file.files) or 'none'}."
            raise InputError(f"{self.name}: {path} has no array '{key}'. {hint}")
        images = file[key]
        problem = _problem(images)
        if self.channels_last and not problem and images.ndim != 4:
            problem = f"channels_last needs arrays (N, height, width, channels), got shape {images.shape}"
        if problem:
            raise InputError(f"{self.name}: array '{key}' of {path} cannot be used: {problem}")
        return _canonical(np.moveaxis(images, -1, 1) if self.channels_last else images)


def _problem(images: Array) -> str | None:
    """Why `images` is not an array of images; None if it is."""
    if images.ndim < 2 or images.size == 0:
        return f"expected shape (N, *image_shape) with at least one pixel, got {images.shape}"
    if images.dtype.kind not in "biuf":
        return f"expected numbers, got {images.dtype}"
    if not np.isfinite(images).all():
        return "it contains NaN or infinite values"
    low, high, limit = images.min(), images.max(), 1 if images.dtype.kind == "f" else 255
    if low < 0 or high > limit:
        kind = "floats" if images.dtype.kind == "f" else "integers"
        return f"expected {kind} from 0 to {limit}, got {low} to {high}"
    return None


def _canonical(images: Array) -> Array:
    """`images` in a format of `GreyImages`."""
    if images.dtype.kind not in "iu":
        return images
    return images.astype(bool) if images.max() <= 1 else images.astype(np.uint8)
