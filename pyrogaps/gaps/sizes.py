"""How many datapoints are worked on at once, and how much memory their evaluations may take."""

from dataclasses import dataclass

from pyrogaps import memory, processes
from pyrogaps.density import JointDensity
from pyrogaps.errors import InputError, counted
from pyrogaps.evidence import Evidence
from pyrogaps.memory import format_bytes
from pyrogaps.streams import BLOCK, PARTICLE_BLOCK

# Batch size at which call overhead becomes negligible.
MOST = 4 * BLOCK
# Vectors of a chain that are alive at once: positions, momenta, proposals, forces, and two gradients of each.
VECTORS, VECTORS_OF_DRAWS = 14, 4
COPIES = 4  # of the log-weights, while estimates are made of them
LEAST_ROOM = 64 << 20
SHARES = 3  # of the room: evaluations, the chains beside them, and what the allocator keeps


@dataclass(frozen=True)
class Sizes:
    """Datapoints in a chunk, and the working set of their evaluations in bytes."""

    batch_size: int
    working_set: int


def sizes_of(
    joint: JointDensity,
    evidence: Evidence,
    num_particles: int,
    batch_size: int | None,
    max_memory: int | str | None,
    kept: int | None = None,
    num_refined: int = 1,
) -> Sizes:
    """What fits `max_memory`, by default four fifths of what the machine has left, on top of what is held already.

    On every machine with some room this is the same for the same model: chunks and working set are smaller only where
    there is little room. Processes that share the work agree on the least of theirs, and chunks that are `kept` already
    of a size that fits set it. A refinement draws `num_refined` at each step, all at once. Raises `InputError` where
    there is not enough for one block of datapoints.
    """
    vectors = max(VECTORS * evidence.num_chains_at_once, VECTORS_OF_DRAWS * max(PARTICLE_BLOCK, num_refined))
    log_weights = 8 * COPIES * (num_particles + evidence.num_log_weights)
    each = vectors * joint.dim * joint.zeros(1).element_size() + log_weights
    number = -(-min(batch_size or 1, joint.num_datapoints) // BLOCK) * BLOCK
    least = max(LEAST_ROOM, SHARES * number * each)

    def own() -> Sizes:
        held = memory.resident()
        limit = held + memory.available() * 4 // 5 if max_memory is None else memory.parse_bytes(max_memory)
        room = limit - held
        if room < least:
            raise InputError(
                f"max_memory: {format_bytes(limit)} is too little; {format_bytes(held)} is in use already, and "
                f"{counted(number, 'datapoint')} at once take {format_bytes(least)}. Allow at least "
                f"{format_bytes(held + least)}, or use a smaller batch_size, fewer draws or fewer chains"
            )
        working_set = min(memory.WORKING_SET, room // SHARES)
        fitting = max(1, working_set // (BLOCK * each)) * BLOCK
        return Sizes(batch_size or min(MOST, fitting), working_set)

    sizes = processes.everywhere(own)
    fitting = min(its.batch_size for its in sizes)
    if batch_size is None and kept is not None and kept <= fitting:
        fitting = kept
    return Sizes(fitting, min(its.working_set for its in sizes))
