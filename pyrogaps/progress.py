"""Progress bars."""

from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """A bar of tqdm without its monitor, a thread that would outlive the call."""

    monitor_interval = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, miniters=1, dynamic_ncols=True, **options)  # type: ignore[call-overload]
