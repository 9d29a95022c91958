"""How many datapoints are worked on at once, and how much memory their evaluations may take."""

from dataclasses import dataclass

from pyrogaps import memory
from pyrogaps.ais import AIS, CHAINS
from pyrogaps.density import JointDensity
from pyrogaps.errors import InputError
from pyrogaps.escalation import Escalation
from pyrogaps.streams import BLOCK, PARTICLE_BLOCK

# As many datapoints share the cost of a call well.
MOST = 4 * BLOCK
# Vectors of a chain that are alive at once: positions, momenta, proposals, forces, and two gradients of each.
VECTORS, VECTORS_OF_DRAWS = 14, 4
LEAST_ROOM = 64 << 20
SHARES = 3  # of the room: evaluations, the chains beside them, and what the allocator keeps


@dataclass(frozen=True)
class Sizes:
    """Datapoints in a chunk, and the working set of their evaluations in bytes."""

    batch_size: int
    working_set: int


def sizes_of(
    joint: JointDensity, evidence: AIS | Escalation, batch_size: int | None, max_memory: int | str | None
) -> Sizes:
    """What fits `max_memory`, by default four fifths of what the machine has left, on top of what is held already.

    On every machine with some room this is the same for the same model: only where the room is short are chunks and
    working set smaller. Raises `InputError` where there is not enough for one block of datapoints.
    """
    held = memory.resident()
    limit = held + memory.available() * 4 // 5 if max_memory is None else memory.parse_bytes(max_memory)
    room = limit - held
    chains = min(CHAINS, evidence.num_chains) if isinstance(evidence, AIS) else CHAINS
    vectors = max(VECTORS * chains, VECTORS_OF_DRAWS * PARTICLE_BLOCK)
    each = vectors * joint.dim * joint.zeros(1).element_size()
    least = max(LEAST_ROOM, SHARES * BLOCK * each)
    if room < least:
        raise InputError(
            f"max_memory: {memory.told(limit)} is too little: {memory.told(held)} are in use already, and {BLOCK} "
            f"datapoints take {memory.told(least)}; allow {memory.told(held + least)} or more, or use fewer chains"
        )
    working_set = min(memory.WORKING_SET, room // SHARES)
    fitting = max(1, working_set // (BLOCK * each)) * BLOCK
    return Sizes(batch_size or min(MOST, fitting), working_set)
