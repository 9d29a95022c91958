"""Keep what is constant out of a record: it is computed once, while the record is made."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pyrogaps.capture.graphs import written
from pyrogaps.capture.reasons import WrongRecord

# Operations that make memory: random numbers are written to the first, and a program may write results to the others.
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
FILLED = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "clone")


class ConstantsApart(TorchDispatchMode):
    """Within a function that is being recorded: records only what depends on its inputs or on random numbers.

    All else is computed now. Its values may be read into Python, as lengths of sequences are.

    Args:
        inputs: of the function.
        buffers: also record new tensors of zeros and the like, for programs that write results into them.

    Raises `WrongRecord` where a result is written into a constant.
    """

    def __init__(self, inputs: Iterable[Tensor], *, buffers: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = EMPTY + FILLED if buffers else EMPTY
        # By identity. The tensors are kept, so that no other takes the place of one.
        self._recorded = {id(value): value for value in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._depends(func, args, kwargs):
            with _disable_current_modes():
                result = func(*args, **kwargs)
            # Sequences are packed by integers that are written to empty memory: constants too.
            if func._schema.name.removeprefix("aten::") not in self._memory or not result.is_floating_point():
                return result
        if any(id(value) not in self._recorded for value in written(func, args, kwargs)):
            raise WrongRecord
        result = func(*args, **kwargs)
        self._recorded.update({id(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)})
        return result

    def _depends(self, function: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation depends on inputs of the record or on random numbers."""
        random = torch.Tag.nondeterministic_seeded in function.tags
        return random or any(id(leaf) in self._recorded for leaf in tree_leaves((args, kwargs)))
