"""`decompose`: the inference gap of a model and a guide on some data, and its parts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrogaps import memory
from pyrogaps.conditioning import Conditioning
from pyrogaps.density import Data
from pyrogaps.density.runs import Program
from pyrogaps.density.shared import SharedLatents
from pyrogaps.evidence import Evidence, Ladder
from pyrogaps.gaps.certificate import Certificate
from pyrogaps.gaps.decomposition import Decomposition
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.retrain import Split
from pyrogaps.gaps.shared_ledger import SharedDecomposition
from pyrogaps.gaps.terms import TERMS, Term, check_tree
from pyrogaps.guard import guarded
from pyrogaps.problem import Problem
from pyrogaps.refine import Refinement
from pyrogaps.refine.families import Family
from pyrogaps.settings import Count, File, Plate, Sample, Seed, Several, checked
from pyrogaps.shared import Shared


@guarded
@checked()
def decompose(
    model: Program | Problem,
    guide: Program | None = None,
    data: Data | None = None,
    *,
    families: Mapping[str, Family] | None = None,
    evidence: Evidence | None = None,
    refinement: Refinement | None = None,
    conditioning: Conditioning | None = None,
    reference: Program | None = None,
    split: Split | None = None,
    certificate: Certificate | None = None,
    referee: Sample = 32,
    shared: Shared | None = None,
    terms: Sequence[Term] | None = None,
    num_particles: Several = 1000,
    plate: Plate = None,
    batch_size: Count | None = None,
    max_memory: memory.Bytes | None = None,
    compile: bool = False,
    seed: Seed = 0,
    progress: bool = True,
    cache: File | None = None,
) -> GapLedger:
    r"""Measure how far a guide is from the truth on every datapoint, and whose fault that is.

    $$\log p(x_n) - \mathcal L[q](x_n) =
      \underbrace{\log p(x_n) - \mathcal L[q^*](x_n)}_{\text{approximation}} +
      \underbrace{\mathcal L[q^*](x_n) - \mathcal L[q](x_n)}_{\text{amortization}}$$

    A guide that is not shown all of x says so: by `conditions`, a boolean mask over the model's first argument (True
    where it is shown) or a function from the model's arguments to masks, or, for a sequence, by `lookahead` = k, where
    the factor of step t is shown the data up to step t + k. Between L[q*] and L[q] then stands q*_C, the best of the
    family that is shown no more than that, and the amortization gap is L[q*_C] - L[q]:

    $$\text{conditioning gap} = \mathcal L[q^*](x_n) - \mathcal L[q^*_C](x_n)$$

    With `split`, which has the data that the guide was trained on, a copy of the guide is trained on for the frozen
    model until it improves no more, $\hat\phi$, and the amortization gap has three children, means over data sets:

    $$A_{eval}(\phi) = \underbrace{A_{train}(\hat\phi)}_{\text{capacity}} +
      \underbrace{L_{train}[q_{\hat\phi}] - L_{train}[q_\phi]}_{\text{optimization}} +
      \underbrace{A_{eval}(\phi) - A_{train}(\phi)}_{\text{generalization}}, \quad
      A_D(\phi) = \frac{1}{|D|} \sum_{n \in D} \mathcal L[q^*_C](x_n) - \mathcal L[q_\phi](x_n)$$

    Latents outside the data plate, theta, are shared by all datapoints. Model and guide are then conditioned on draws
    of theta from the guide. Gaps per datapoint are means over these, and the gap of the data set has one more part:

    $$\log p(x) - \mathcal L = KL(q(\theta) \| p(\theta|x)) +
      \sum_n \mathbb E_{q(\theta)}[\log p(x_n|\theta) - \mathcal L_n(\theta)]$$

    Every estimate uses draws of its own. log p(x) and L[q*] are bounded from below, so gaps are understated where AIS
    or the refinement fell short. `Bridge` estimates log p(x), and the inference gap with it, without bounding either:
    see the directions in the ledger.

    Args:
        model: a Pyro model, called with the arguments that `data` gives; or a `Problem`, in place of model, guide and
            data.
        guide: a Pyro guide for it, trained.
        data: a tensor or array, or a tuple of them, whose first axis is the data plate, or an `IndexedData`.
        families: further families, `name -> family(model) -> guide`, each refined per datapoint, beside the tree.
        evidence: how log p(x) is measured: `Ladder(...)`, which measures each datapoint to a stated standard error;
            `AIS(...)` or `Bridge(...)`, with the same settings for all; or another `Evidence`. None: `Ladder()`.
        refinement: settings of the per-datapoint refinement.
        conditioning: settings of the shared posterior that measures the conditioning gap of `conditions`.
        reference: for a `lookahead`, a guide with the same one, trained as well as can be for this model
            (`SimulatedData`): its ELBO takes the place of L[q*_C]. Without it the gap stays in the amortization gap.
        split: the training data, and how to train the guide on; None leaves the amortization gap whole.
        certificate: what to spend on finding out how wrong the bounds can be; None spends nothing.
        referee: how many datapoints are examined from other starts, for modes that log p(x) and the refinement miss: a
            random sample, or all if there are fewer. Results of these include the modes found; a warning states by how
            much the others are too low. False examines none.
        shared: what to spend on latents outside the data plate, which all datapoints share: the draws of them that gaps
            per datapoint are given, and the global gap.
        terms: the gaps of the tree, by default `TERMS`; `TERMS + (mine,)` adds one.
        num_particles: draws for each ELBO and for the IWAE bound.
        plate: the data plate's name, see `JointDensity`.
        batch_size: datapoints worked on at once, in whole blocks of 64; it changes the ledger in rounding alone. None
            takes what suits the model, the same on every machine.
        max_memory: what this process may use, in bytes or as in "4GiB"; None: four fifths of what the machine has left.
            Memory does not grow with the number of datapoints or temperatures, and of draws and chains the log-weights
            alone are held, a chunk at a time.
        compile: whether to give the recorded density to `torch.compile`. It pays in long runs of models with many
            elementwise operations; compiling takes about 20 s, and results differ in their last digits.
        seed: of all the randomness.
        progress: whether to show a progress bar.
        cache: a folder for finished chunks; a run that was stopped continues there.

    Returns:
        A `GapLedger`; `print` it, plot it with `plot_gaps`, or take `.per_datapoint` and `.to_datatree()`.

    Raises:
        InputError: in one line that names the site, argument or family, for anything that has no gap per datapoint.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> ledger = pg.decompose(model, guide, x, num_particles=50, progress=False)
        >>> parts = ledger.per_datapoint["approximation_gap"] + ledger.per_datapoint["amortization_gap"]
        >>> bool((abs(parts - ledger.per_datapoint["inference_gap"]) < 1e-9).all())
        True
    """
    terms = TERMS if terms is None else terms
    check_tree(terms)
    options: dict[str, Any] = {
        "families": families or {},
        "evidence": evidence or Ladder(),
        "refinement": refinement or Refinement(),
        "conditioning": conditioning or Conditioning(),
        "reference": reference,
        "split": split,
        "certificate": certificate,
        "num_particles": num_particles,
        "batch_size": batch_size,
        "max_memory": max_memory,
        "seed": seed,
        "progress": progress,
        "cache": None if cache is None else Path(cache),
        "referee": int(referee),
    }
    decomposition: Decomposition | SharedDecomposition
    try:
        problem = Problem.of(model, guide, data, plate)
        decomposition = Decomposition(problem.compiled() if compile else problem, **options)
    except SharedLatents as found:
        pair = SharedDecomposition.of(found, model, guide, data)
        decomposition = pair(shared or Shared(), options, compile)
    return decomposition.ledger(terms)


@guarded
def rehearse(
    model: Program, guide: Program, data: Data, plate: Plate, shared: Shared | None = None, **settings: Any
) -> None:
    """Raise, in seconds, what `decompose` would raise with these `settings` for anything but the values of weights.

    Families are built and run, and the first datapoints are measured with a few steps and draws.
    """
    try:
        Decomposition(Problem.of(model, guide, data, plate), **settings).rehearse()
    except SharedLatents as found:
        SharedDecomposition.of(found, model, guide, data)(shared or Shared(), settings).rehearse()
