"""`python -m tests.fuzz [NUMBER [FIRST]]` checks many random programs and counts the outcomes."""

import sys
import time
import traceback
from collections import Counter

from tests.fuzz.checks import check, spec_of


def main(number: int = 500, first: int = 0) -> int:
    """Check `number` seeds; print what failed, and the counts."""
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + number):
        began, spec = time.perf_counter(), spec_of(seed)
        try:
            outcome = check(spec)
        except AssertionError as error:
            outcome = "WRONG"
            print(f"{seed}: {error}\n    {spec}", flush=True)
        except Exception as error:
            outcome = "TRACEBACK"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{seed}: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})\n    {spec}", flush=True)
        outcomes[outcome] += 1
        if time.perf_counter() - began > 60:
            print(f"{seed}: took {time.perf_counter() - began:.0f} s", flush=True)
    print(dict(outcomes))
    return int(bool(outcomes["WRONG"] + outcomes["TRACEBACK"]))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
