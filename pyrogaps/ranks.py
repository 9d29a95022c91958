"""Which of several processes this one is, where `torch.distributed` runs more than one."""

import torch.distributed as distributed


def rank() -> int:
    """The number of this process among all, from 0; 0 where `torch.distributed` is not initialised."""
    return distributed.get_rank() if _initialised() else 0


def world_size() -> int:
    """The number of processes; 1 where `torch.distributed` is not initialised."""
    return distributed.get_world_size() if _initialised() else 1


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()
