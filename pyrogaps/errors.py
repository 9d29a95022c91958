"""The one exception for input that cannot be used as it is, and the checks that settings share."""

from collections.abc import Iterable, Mapping
from typing import Any


class InputError(ValueError):
    """Bad input, said in one line that names the site, argument or file and the remedy.

    The command turns it into exit code 2 and that line; a Python user catches it as a `ValueError`.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def at_least(section: str, settings: Any, least: Mapping[str, float]) -> None:
    """Raise `InputError` for the first of the fields in `least` that is below its bound."""
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise InputError(f"{section}.{name}: must be at least {bound}, got {getattr(settings, name)}")


def positive(section: str, settings: Any, names: Iterable[str]) -> None:
    """Raise `InputError` for the first of the fields in `names` that is not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise InputError(f"{section}.{name}: must be positive, got {getattr(settings, name)}")


def between_0_and_1(name: str, value: float) -> None:
    """Raise `InputError` for a probability that is 0, 1, or none."""
    if not 0 < value < 1:
        raise InputError(f"{name}: must lie between 0 and 1, got {value}")
