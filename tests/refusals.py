"""What a refusal looks like: one line that holds the words that a user needs."""

from collections.abc import Callable
from typing import Any

import pytest

import pyrogaps as pg


def refuses(call: Callable[[], Any], *words: str) -> None:
    """Assert that `call` raises an `InputError` of one line, which has all `words`."""
    with pytest.raises(pg.InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message
