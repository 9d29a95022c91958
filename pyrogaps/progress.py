"""Progress bars."""

import time
from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """A bar of tqdm without its monitor, a thread that would outlive the call."""

    monitor_interval = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, miniters=1, dynamic_ncols=True, **options)  # type: ignore[call-overload]

    def refresh(self, *args: Any, **options: Any) -> None:
        """Show the bar as it is, where its `delay` is over: other words alone do not end it."""
        begun = getattr(self, "start_t", None)  # not set while tqdm makes a bar
        if begun is None or time.time() - begun >= self.delay:
            super().refresh(*args, **options)
