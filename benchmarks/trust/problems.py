"""All the problems. Another kind is another file, and a line here."""

from benchmarks.trust import conditioned, curved, extremes, gaussians, heavy, hierarchies, modes, supports
from benchmarks.trust.problem import Problem

KINDS = (gaussians, modes, curved, heavy, supports, hierarchies, extremes, conditioned)
PROBLEMS: dict[str, Problem] = {problem.name: problem for kind in KINDS for problem in kind.PROBLEMS}
