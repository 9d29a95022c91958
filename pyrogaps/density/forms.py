"""What a caller passes as data, as the arguments of a model, and arguments in the caller's form again."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyrogaps.density.arguments import Parameters, names_filled, parameters_of
from pyrogaps.density.data import Data, HeldData, IndexedData, as_tuple, beyond, check_tensor, is_constant
from pyrogaps.density.items import COLLECT, Rows, batches_of, items_of, plain, whole_tensors
from pyrogaps.density.plates import WrongSize
from pyrogaps.density.runs import MisreadData, Program
from pyrogaps.errors import InputError
from pyrogaps.guard import ProgramError, described, is_out_of_memory

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Given:
    """Data in a caller's form.

    Attributes:
        everything: the model's arguments for all data at once, not indexed.
        indexed: the datapoints, by index; raises `InputError` where the data have no axis of datapoints.
        restored: arguments like those of `everything` in the caller's form.
        arguments: data in the caller's form as arguments.
        names: the model's parameters that data by name fill, in the order of the arguments; None for other data.
        in_memory: the arguments where they are at hand; None where they are fetched.
        unread: where data by name are one argument, because no key is one of the model's parameters, a sentence that
            says so; else empty.
        fetched: whether a function of the caller fetches the datapoints.
    """

    everything: Callable[[], Args]
    indexed: Callable[[], IndexedData]
    restored: Callable[[Args], Any]
    arguments: Callable[[Any], Args]
    names: tuple[str, ...] | None = None
    in_memory: Args | None = None
    unread: str = ""
    fetched: bool = False

    @contextmanager
    def misread_named(self) -> Iterator[None]:
        """Say of a model that fails with one dictionary that no key of it is a parameter; and of one that a function of
        the caller gives another number of rows, what that must return.
        """
        try:
            yield
        except Exception as error:
            if self.fetched and isinstance(error, WrongSize):
                raise InputError(error.of_fetch) from error
            other = isinstance(error, InputError) and not isinstance(error, ProgramError | MisreadData)
            if not self.unread or other or is_out_of_memory(error):
                raise
            reason = "" if isinstance(error, MisreadData) else f" ({described(error)})"
            raise InputError(f"{self.unread}{reason}") from error

    @property
    def held(self) -> bool:
        """Whether no argument has datapoints, so that the model holds the data itself."""
        return self.in_memory is not None and all(is_constant(leaf) for leaf in tree_leaves(self.in_memory))

    @property
    def tensor(self) -> Tensor | None:
        """The one tensor that the data are; None for other data."""
        args = self.in_memory or ()
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else None


def as_given(data: Data | Given | None, model: Program | None = None) -> Given:
    """`data` as arguments of `model`, by its signature; None where the data are not for a model.

    Raises `InputError` for what cannot be indexed, and arrays and tensors without usable numbers.
    """
    if isinstance(data, Given):
        return data
    if isinstance(data, IndexedData):
        everything = lambda: data.fetch(torch.arange(len(data)))  # noqa: E731
        return Given(everything, lambda: data, lambda args: args, as_tuple, fetched=True)
    if inspect.isclass(data):
        raise InputError(f"data: {data.__name__} is a class. Pass an object of it, {data.__name__}(...)")
    taken = None if model is None else parameters_of(model)
    if isinstance(data, DataLoader | Dataset):
        tensors = whole_tensors(data)
        if tensors is not None:
            return _in_memory(tensors, lambda args: TensorDataset(*plain(args)), as_tuple)
        return _by_item(data, taken)
    if callable(data) and not hasattr(data, "__getitem__") and not hasattr(data, "__array__"):
        raise InputError(
            f"data: expected what the model is called with, got {type(data).__name__}. Pass tensors here, and a guide "
            "as guide= or guide_or_family="
        )
    if isinstance(data, Iterator):
        raise InputError(f"data: a {type(data).__name__} has no items to select by index. {COLLECT}")
    if isinstance(data, Mapping):
        return _mapping(data, taken)
    if isinstance(data, list) and not _are_numbers(data) and not _are_arguments(data, taken):
        return _by_item(data, taken)
    if isinstance(data, PackedSequence):
        raise InputError(
            "data: a PackedSequence has no axis of datapoints. Pass the padded sequences and their lengths, and pack "
            "them inside the programs"
        )
    if isinstance(data, list | tuple) and not _are_numbers(data):
        return _several(data)
    if data is None:
        return _in_memory((), lambda args: None, as_tuple)
    if not isinstance(data, Tensor | np.ndarray | list) and not is_frame(data) and not _is_array(data):
        if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes | tuple):
            return _by_item(data, taken)
        raise InputError(
            f"data: expected a tensor or a tuple of tensors whose first axis is the data plate, got "
            f"{type(data).__name__}. Pass tensors, arrays, a dictionary of them or a Dataset, or wrap what you have in "
            "IndexedData(num_datapoints, fetch)"
        )
    back = _back(data)
    return _in_memory((_converted(data),), lambda args: back(args[0]), lambda value: (_converted(value),))


def check_present(model: Program, data: Any, remedy: str) -> None:
    """Refuse data that are missing, for a model that takes arguments."""
    empty = data is None or (isinstance(data, tuple) and not data)
    if empty and ((taken := parameters_of(model)) is None or not taken.take(0)):
        raise InputError(f"data: missing. {remedy}")


def as_indexed(data: Data | Given | None, model: Program | None = None) -> IndexedData:
    """View `data` as an `IndexedData` of arguments of `model`.

    Raises `InputError` where the data have no datapoints to select by index, or differ in their number.
    """
    given = as_given(data, model)
    return whole(given) if given.held else given.indexed()


def whole(data: Data | Given | None, model: Program | None = None) -> IndexedData:
    """The whole data set as one datapoint, its arguments not indexed."""
    given = as_given(data, model)
    return IndexedData(1, lambda indices: given.everything())


def held(data: Given, size: int) -> HeldData:
    """The `size` datapoints that the model holds itself."""
    return HeldData(size, lambda indices: data.everything(), torch.arange(size), size)


def _several(data: list[Any] | tuple[Any, ...]) -> Given:
    """The model's arguments."""
    back = [_back(value) for value in data]

    def restored(args: Args) -> Any:
        values = [restore(value) for restore, value in zip(back, args, strict=True)]
        return type(data)(*values) if hasattr(data, "_fields") else type(data)(values)

    def arguments(value: Any) -> Args:
        return tuple(_converted(part) for part in as_tuple(value))

    return _in_memory(arguments(data), restored, arguments)


def _in_memory(
    args: Args,
    restored: Callable[[Args], Any],
    arguments: Callable[[Any], Args],
    names: tuple[str, ...] | None = None,
) -> Given:
    for position, arg in enumerate(args):
        name = (f"element {position}" if len(args) > 1 else "the tensor") if names is None else f"'{names[position]}'"
        for leaf in tree_leaves(arg):
            if isinstance(leaf, Tensor):
                check_tensor(leaf, name)
    return Given(lambda: args, lambda: _indexed(args), restored, arguments, names, args)


def _indexed(args: Args) -> IndexedData:
    leaves = tree_leaves(args)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and not is_constant(leaf):
            raise InputError(
                f"data: expected a tensor or a tuple of tensors whose first axis is the data plate, got a tuple with a "
                f"{type(leaf).__name__}. Wrap it in IndexedData(num_datapoints, fetch)"
            )
    lengths = [len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not lengths:
        raise InputError(
            "data: a tensor without dimensions has no axis of datapoints. Pass x[None] for one datapoint, or "
            "plate=False to treat the whole data set as one"
        )
    if len(set(lengths)) > 1:
        raise InputError(
            f"data: the tensors have different lengths along their first axis, the data plate: {lengths}. Cut them to "
            "one length, pass plate=False to treat the whole data set as one datapoint, or, where one belongs to all "
            "datapoints, pass IndexedData(N, lambda rows: (x[rows], w))"
        )
    if not lengths[0]:
        raise InputError("data: there are no datapoints")

    def fetch(indices: Tensor) -> Args:
        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, indices.to(tensor.device)) if tensor.dim() else tensor

        try:
            return as_tuple(tree_map_only(Tensor, rows, args))
        except IndexError as error:
            raise beyond(lengths[0]) from error

    return IndexedData(lengths[0], fetch)


def _mapping(data: Mapping[str, Any], taken: Parameters | None) -> Given:
    """Data by name: the model's parameters, or one dictionary that it takes."""
    if any(not isinstance(key, str) for key in data):
        raise InputError("data: the keys of a dictionary of data must be the names of the model's parameters")
    if not data:
        raise InputError("data: the dictionary is empty. Pass what the model is called with, by name")
    names = names_filled(data, taken)
    values = {key: _converted(value) for key, value in data.items()}
    back = {key: _back(value) for key, value in data.items()}

    def read(given: Any) -> Args:
        if not isinstance(given, Mapping):
            return as_tuple(given)
        return _by_name({key: _converted(value) for key, value in given.items()}, names, taken)

    def restored(args: Args) -> Any:
        found = args[0] if names is None else dict(zip(names, args, strict=True))
        return {key: restore(found[key]) for key, restore in back.items()}

    found = _in_memory(_by_name(values, names, taken), restored, read, names)
    return replace(found, unread=_unread(data, names, taken))


def _unread(keys: Mapping[str, Any], names: tuple[str, ...] | None, taken: Parameters | None) -> str:
    """The sentence on a model that takes data by name as one argument."""
    if names is not None or taken is None:
        return ""
    first, (known, whole) = next(iter(keys)), ("*args", "args[0]")
    if taken.names:
        known, whole = ", ".join(taken.names), taken.names[0]
    return (
        f"data: no key of the dictionary ({', '.join(map(repr, keys))}) is a parameter of the model (it takes {known}),"
        " so the dictionary is passed as its one argument, with which it does not run. Name the keys as the "
        f"parameters, or read them in the model, as in {whole}['{first}']"
    )


def _by_name(values: Mapping[str, Any], names: tuple[str, ...] | None, taken: Parameters | None) -> Args:
    """Values by name as arguments: in the order of `names`, with defaults where there is none, or as one dictionary."""
    if names is None:
        return (dict(values),)
    defaults = {} if taken is None else taken.defaults
    return tuple(values[name] if name in values else defaults[name] for name in names)


def _by_item(data: Any, taken: Parameters | None) -> Given:
    """A map-style data set, or a list of datapoints."""
    items, collate = items_of(data)
    number, batch = len(items), batches_of(items, collate)
    if not number:
        raise InputError("data: there are no datapoints")
    example = batch(torch.zeros(1, dtype=torch.long))
    by_name = isinstance(example, Mapping)
    names = names_filled(example, taken) if by_name else None
    unread = _unread(example, names, taken) if by_name else ""

    def arguments(value: Any) -> Args:
        return _by_name(value, names, taken) if isinstance(value, Mapping) else as_tuple(value)

    def restored(args: Args) -> Any:
        like: Any = args if isinstance(example, list | tuple) else args[0]
        if names is not None:
            like = {key: value for key, value in zip(names, args, strict=True) if key in example}
        rows = Rows(plain(like), len(next(leaf for leaf in tree_leaves(like) if isinstance(leaf, Tensor))))
        return [rows[index] for index in range(len(rows))] if isinstance(data, list) else rows

    for position, leaf in enumerate(tree_leaves(example)):
        if isinstance(leaf, Tensor):
            check_tensor(leaf, f"element {position} of its items")
    indexed = IndexedData(number, lambda indices: arguments(batch(indices)))
    everything = lambda: indexed.fetch(torch.arange(number))  # noqa: E731
    return Given(everything, lambda: indexed, restored, arguments, names, unread=unread)


def _are_arguments(data: list[Any], taken: Parameters | None) -> bool:
    """Whether a list is one of the model's arguments, rather than of its datapoints."""
    fits = taken is None or taken.take(len(data))
    return fits and (len(data) > 0 or taken is None) and not any(isinstance(v, tuple | list | Mapping) for v in data)


def _are_numbers(value: Any) -> bool:
    """Whether `value` is a list of numbers, or of such lists."""
    if not isinstance(value, list) or not value:
        return False
    return all(_are_numbers(item) or isinstance(item, bool | int | float | np.generic) for item in value)


def _is_array(value: Any) -> bool:
    """Whether `value` is an array of some other library."""
    own = isinstance(value, Tensor | np.ndarray | Mapping | list | tuple) or is_constant(value) or is_frame(value)
    return not own and hasattr(value, "__array__")


def is_frame(value: Any) -> bool:
    """Whether `value` is a DataFrame or a Series of pandas, which is not imported for that."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame | pandas.Series)


def _converted(value: Any) -> Any:
    """`value` with its arrays, frames and lists of numbers as tensors, which gradients of other things can pass by."""
    if is_frame(value):
        return _from_frame(value)
    if _are_numbers(value):
        return _from_lists(value)
    if _is_array(value):
        value = np.asarray(value)

    def tensor(leaf: Any) -> Any:
        return _without_history(_from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf)

    return tree_map(lambda leaf: tensor(leaf) if isinstance(leaf, np.ndarray | Tensor) else leaf, value)


def _back(value: Any) -> Callable[[Any], Any]:
    """From the tensor that `value` was converted to, or another like it, to its form."""
    if is_frame(value):
        return lambda tensor: _as_frame(value, tensor)
    if _are_numbers(value):
        return lambda tensor: tensor.tolist()
    if isinstance(value, np.ndarray) or _is_array(value):
        return lambda tensor: tensor.detach().cpu().numpy()
    return lambda tensor: tensor


def _from_lists(value: list[Any]) -> Tensor:
    try:
        return torch.tensor(value)
    except (ValueError, RuntimeError) as error:
        if "expected sequence" not in str(error):
            raise InputError("data: a number in the lists has more than 64 bits. Write it as a float, 1e20") from error
        raise InputError("data: the lists differ in length. Pad them to one length and mask the padding") from error


def _from_frame(frame: Any) -> Tensor:
    for name, column in [(None, frame)] if frame.ndim == 1 else frame.items():
        if not _holds_numbers(column):
            odd = "its values" if name is None else f"column '{name}'"
            raise InputError(
                f"data: {odd} cannot become numbers (dtype {column.dtype}). Pass the columns that are numbers"
            )
    return torch.as_tensor(frame.to_numpy(dtype="float64", copy=True), dtype=torch.get_default_dtype())


def _holds_numbers(column: Any) -> bool:
    """Whether a column is of real numbers; missing ones, which are refused as NaN, are among them."""
    kind = getattr(column.dtype, "kind", "O")
    return kind in "biuf" or (kind == "O" and all(map(_is_real, column.dropna())))


def _is_real(value: Any) -> bool:
    return isinstance(value, Number | np.bool_) and not isinstance(value, complex | np.complexfloating)


def _as_frame(frame: Any, tensor: Tensor) -> Any:
    index = frame.index if len(tensor) == len(frame) else None
    values = tensor.detach().cpu().numpy()
    named = {"name": frame.name} if frame.ndim == 1 else {"columns": frame.columns}
    return type(frame)(values, index=index, **named)


def _from_numpy(array: Any) -> Tensor:
    if np.ma.is_masked(array):
        raise InputError(
            "data: an array has masked elements, which a tensor cannot have. Pass x.filled(0.0) and seen = ~x.mask, "
            "and give the distribution of the site .mask(seen), before any .to_event"
        )
    if array.dtype == np.longdouble and array.dtype.itemsize > 8:
        raise InputError(f"data: an array has dtype {array.dtype}. Convert it with x.astype(float)")
    if not array.dtype.isnative or min(array.strides, default=0) < 0:  # which torch does not read
        array = np.array(array, array.dtype.newbyteorder("="))
    try:
        return torch.as_tensor(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise InputError(f"data: an array of dtype {array.dtype} cannot become a tensor. Pass numbers") from error


def _without_history(tensor: Tensor) -> Tensor:
    """`tensor` as gradients of other things can pass it by: data may come from an inference mode, or a network."""
    return tensor.clone() if tensor.is_inference() else tensor.detach() if tensor.requires_grad else tensor
