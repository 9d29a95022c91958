"""Small pictures of datapoints, to show beside their numbers: thumbnails of images, sparklines, short rows."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils._pytree import tree_leaves

from pyrogaps.density import Data, IndexedData
from pyrogaps.density.forms import as_given
from pyrogaps.density.items import batches_of, items_of
from pyrogaps.errors import InputError, counted
from pyrogaps.gaps import GapLedger
from pyrogaps.plots.datapoints import image_shape
from pyrogaps.report.columns import plain

MAX_SIDE, MIN_SIDE = 64, 8  # pixels of a thumbnail
COLUMNS, PER_SHEET = 16, 256  # thumbnails beside one another on a sheet, and on a sheet
GREYS, COLOURS = 16, 64  # of a sheet
MAX_POINTS, MIN_POINTS, MAX_CHANNELS = 64, 8, 3  # of a sparkline
MAX_NUMBERS, LONG = 8, 32  # numbers of a row that are shown; from how many on it is a sequence
LEVELS, MISSING = 255, 255  # of a sparkline, and what stands for a value that is not there
CHUNK = 512


def pictures_of(ledger: GapLedger, data: Data | None, rows: NDArray[np.int64], most: int) -> dict[str, Any] | None:
    """Pictures of the datapoints `rows` in at most `most` bytes, as plain values for JSON; None where there are none.

    Pictures are of the first tensor of the data; a mask beside it hides what it does not show. Thumbnails have at most
    64 pixels a side, and fewer where they would not fit otherwise; what still does not fit is left out, smallest gaps
    first. Raises `InputError` for data of another size than the ledger's.
    """
    shown = _shown(ledger, data, rows)
    if shown is None or shown.dtype.kind not in "fiub":
        return None
    values = shown.astype(float)
    shape = image_shape(values.shape[1:])
    if shape is not None:
        return _thumbnails(values.reshape(len(values), *shape), _by_gap(ledger, rows), most)
    flat = values.reshape(len(values), -1)
    if values.ndim == 3 and values.shape[2] <= MAX_CHANNELS:
        return _sparklines(values, most)
    if values.ndim == 2 and flat.shape[1] > LONG:
        return _sparklines(values[:, :, None], most)
    numbers = [[plain(float(f"{number:.4g}")) for number in row[:MAX_NUMBERS]] for row in flat]
    return {"kind": "row", "values": numbers, "total": flat.shape[1]}


def _shown(ledger: GapLedger, data: Data | None, rows: NDArray[np.int64]) -> NDArray[Any] | None:
    """The first tensor of the datapoints `rows`, `(len(rows), ...)`."""
    number = ledger.per_datapoint.sizes["datapoint"]
    if data is None:
        x = ledger.observed["x"].values if "x" in ledger.observed else None
        return None if x is None or len(x) != number else x[rows]
    indexed = None if number == 1 else _indexed(data, number)
    if indexed is None:
        return None
    if len(indexed) != number:
        raise InputError(
            f"data: has {counted(len(indexed), 'datapoint')}, and the ledger {number:,}. Pass the data that decompose "
            "was called with"
        )
    chunks = [_first_tensor(indexed, chunk) for chunk in torch.as_tensor(rows).split(CHUNK)]
    present = [chunk for chunk in chunks if chunk is not None]
    alike = len(present) == len(chunks) and len({chunk.shape[1:] for chunk in present}) == 1
    return np.concatenate(present) if alike else None


def _indexed(data: Data, number: int) -> IndexedData | None:
    """The data by index; None where the model holds them itself."""
    # Without the model, the length of a list tells whether it is one of arguments or of `number` datapoints.
    if isinstance(data, list) and len(data) == number and any(_length(item) != number for item in data):
        return IndexedData(number, batches_of(*items_of(data)))
    given = as_given(data)
    return None if given.held else given.indexed()


def _length(item: Any) -> int:
    """Of a list's item: how many datapoints it has, were it an argument."""
    return len(item) if getattr(item, "ndim", 1) and hasattr(item, "__len__") else 0


def _first_tensor(data: IndexedData, indices: torch.Tensor) -> NDArray[Any] | None:
    """The first tensor with a row for each of `indices`, hidden where a mask of its leading shape is False."""
    leaves = [
        leaf.detach().cpu()
        for leaf in tree_leaves(data.fetch(indices))
        if isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == len(indices)
    ]
    numbers = [leaf for leaf in leaves if not leaf.is_complex() and leaf.dtype != torch.bool] or leaves
    if not numbers:
        return None
    x = numbers[0]
    masks = [leaf for leaf in leaves if leaf.dtype == torch.bool and leaf is not x]
    for mask in masks:
        if x.dim() > 1 and mask.dim() > 1 and mask.shape == x.shape[: mask.dim()]:
            x = x.double().masked_fill(~mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), torch.nan)
    return np.asarray(x.numpy() if x.dtype != torch.bfloat16 else x.float().numpy())


def _by_gap(ledger: GapLedger, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places in `rows`, the largest inference gap first."""
    gap = ledger.per_datapoint["inference_gap"].values[rows].astype(float)
    return np.argsort(-np.nan_to_num(gap, nan=-np.inf, posinf=np.inf), kind="stable")


def _thumbnails(images: NDArray[np.float64], order: NDArray[np.int64], most: int) -> dict[str, Any]:
    """Sheets of thumbnails `(N, height, width)` or `(N, height, width, 3)`, as PNG in base64."""
    if images.ndim == 4 and images.shape[1] == 3 and images.shape[3] != 3:
        images = images.transpose(0, 2, 3, 1)
    finite = images[np.isfinite(images)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    pixels = np.nan_to_num((images - low) / ((high - low) or 1.0), nan=0.0, posinf=1.0, neginf=0.0)
    if images.ndim == 3:
        pixels = 1 - pixels  # dark ink on white paper, as in the other pictures
    levels = np.round(255 * pixels).astype(np.uint8)
    for side, chosen in _smaller(max(images.shape[1:3]), order):
        parts = np.split(chosen, range(PER_SHEET, len(chosen), PER_SHEET))
        sheets = [_sheet(levels[parts[0]], side)]
        if len(parts) > 1 and len(sheets[0]) * len(chosen) > most * PER_SHEET:
            continue  # they would be as large as the first, so they do not fit
        sheets += [_sheet(levels[part], side) for part in parts[1:]]
        if sum(map(len, sheets)) <= most:
            break
    height, width = _fitted(images.shape[1:3], side)
    place = np.full(len(images), -1)
    place[chosen] = np.arange(len(chosen))
    known = {"width": width, "height": height, "columns": COLUMNS, "per_sheet": PER_SHEET}
    return {"kind": "image", **known, "sheets": sheets, "place": place.tolist()}


def _smaller(side: int, order: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Sides and choices of thumbnails, each smaller than the one before: first the pixels shrink, then the number."""
    side, number = min(side, MAX_SIDE), len(order)
    while side > 2 * MIN_SIDE:
        yield side, order
        side = max(side // 2, 2 * MIN_SIDE)
    while number > PER_SHEET:
        yield side, order[:number]
        number = max(number // 2, PER_SHEET)
    yield side, order[:number]
    yield min(side, MIN_SIDE), order[:PER_SHEET]


def _fitted(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Height and width of an image of `shape` whose longer side has at most `side` pixels."""
    scale = min(1.0, side / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _sheet(pixels: NDArray[np.uint8], side: int) -> str:
    """Thumbnails beside and below one another."""
    height, width = _fitted(pixels.shape[1:3], side)
    size = COLUMNS * width, -(-len(pixels) // COLUMNS) * height
    sheet = Image.new("L" if pixels.ndim == 3 else "RGB", size, "white")
    for place, image in enumerate(pixels):
        row, column = divmod(place, COLUMNS)
        thumbnail = Image.fromarray(image)
        if thumbnail.size != (width, height):
            thumbnail = thumbnail.resize((width, height), Image.Resampling.BOX)
        sheet.paste(thumbnail, (column * width, row * height))
    buffer = io.BytesIO()
    grey = pixels.ndim == 3
    # The fast method keeps colours; greys are few.
    shades = sheet.quantize(GREYS) if grey else sheet.quantize(COLOURS, Image.Quantize.FASTOCTREE)
    shades.save(buffer, "PNG", compress_level=9)
    return base64.b64encode(buffer.getvalue()).decode()


def _sparklines(values: NDArray[np.float64], most: int) -> dict[str, Any]:
    """Sequences `(N, length, channels)` on one scale, thinned out evenly, a byte a value, in base64."""
    number, length, channels = values.shape
    points = max(MIN_POINTS, min(MAX_POINTS, length, 3 * most // (4 * number * channels)))
    at = np.unique(np.round(np.linspace(0, length - 1, points)).astype(int))
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    scaled = np.round((values[:, at] - low) / ((high - low) or 1.0) * (LEVELS - 1))
    levels = np.where(np.isfinite(scaled), scaled, MISSING).astype(np.uint8)
    return {
        "kind": "sequence",
        "length": length,
        "points": len(at),
        "channels": channels,
        "low": low,
        "high": high,
        "missing": MISSING,
        "values": base64.b64encode(levels.transpose(0, 2, 1).tobytes()).decode(),
    }
