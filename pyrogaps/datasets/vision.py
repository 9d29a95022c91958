"""MNIST, FashionMNIST and CIFAR-10, from torchvision's folders."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyrogaps.datasets.folder import FOLDER, data_folder, reading
from pyrogaps.datasets.images import Array, GreyImages, ImageData
from pyrogaps.errors import InputError

REFETCH = "Delete it and download it again with --download (download=True)."


@dataclass(kw_only=True, eq=False)
class VisionData(ImageData):
    """One of torchvision's data sets, named like its class there.

    Args:
        data_root: torchvision's `root`, the parent of the set's folder; None uses the environment variable
            PYROGAPS_DATA.
        download: download missing files into that folder.
    """

    data_root: str | None = None
    download: bool = False

    def _locate(self, *files: str) -> list[Path]:
        """Paths of `files`, downloaded if requested; `InputError` if one is missing."""
        root = data_folder(self.data_root)
        if root is None:
            hint = "" if self.download else "; --download (download=True) downloads the files there"
            raise InputError(f"{self.name}: no data folder is set for {files[0]}. Set one with {FOLDER}{hint}.")
        paths = [root / file for file in files]
        if self.download and not all(path.is_file() for path in paths):
            self._fetch(root)
        for path in paths:
            if not path.is_file():
                hint = "" if self.download else ", or add --download (download=True) to download it there"
                remedy = f"Set {FOLDER} to the folder that contains {Path(files[0]).parts[0]}/{hint}."
                raise InputError(f"{self.name}: there is no file {path}. {remedy}")
        return paths

    def _fetch(self, root: Path) -> None:
        from torchvision import datasets  # slow to import, and rarely needed

        try:
            getattr(datasets, self.name)(root, download=True)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.name}: cannot download to {root}: {reason}") from error


class MNIST(VisionData):
    """60,000 training and 10,000 test images of handwritten digits, 28 x 28 pixels."""

    def read(self) -> GreyImages:
        names = (f"{part}-images-idx3-ubyte" for part in ("train", "t10k"))
        train, test = self._locate(*(f"{self.name}/raw/{name}" for name in names))
        return GreyImages(self._idx(train), self._idx(test))

    def _idx(self, path: Path) -> Array:
        with reading(self.name, path, REFETCH):
            return read_idx_images(path)


class FashionMNIST(MNIST):
    """60,000 training and 10,000 test images of clothes, 28 x 28 pixels, in MNIST's file format."""


class CIFAR10(VisionData):
    """50,000 training and 10,000 test colour photographs of 32 x 32 pixels, `(3, 32, 32)`."""

    def read(self) -> GreyImages:
        from torchvision import datasets  # slow to import, and rarely needed
        from torchvision.datasets.utils import check_integrity

        loader = datasets.CIFAR10
        folder, entries = loader.base_folder, [*loader.train_list, *loader.test_list]
        paths = self._locate(*(f"{folder}/{entry[0]}" for entry in entries))
        for path, (_, checksum) in zip(paths, entries, strict=True):
            with reading(self.name, path, REFETCH):
                if not check_integrity(path, checksum):
                    raise ValueError("it is damaged or truncated (its checksum is wrong)")
        root = paths[0].parents[1]
        with reading(self.name, root / folder, REFETCH):
            train, test = (loader(os.fspath(root), train=train).data for train in (True, False))
        return GreyImages(train.transpose(0, 3, 1, 2), test.transpose(0, 3, 1, 2))


def read_idx_images(path: Path) -> Array:
    """The images of an idx file, `(N, height, width)` bytes; `ValueError` if it is damaged or has another format.

    torchvision's own reader is not used because its error for a truncated file is no help.
    """
    content = path.read_bytes()
    header = np.frombuffer(content[:16], dtype=">u4") if len(content) >= 16 else np.zeros(4, int)
    if header[0] != 0x0803:  # bytes, in three dimensions
        raise ValueError(f"it is not an idx file of images ({len(content)} bytes)")
    shape = tuple(int(size) for size in header[1:])
    if len(content) != 16 + np.prod(shape):
        raise ValueError(f"it is damaged or truncated: {len(content)} bytes instead of {16 + np.prod(shape)}")
    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(shape)
