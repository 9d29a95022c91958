"""Latents shared by the datapoints of a plate: what they are, and which plate is the data plate beside them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pyrogaps.density.discrete import is_discrete
from pyrogaps.density.structure import find_plate
from pyrogaps.errors import InputError


class SharedLatents(InputError):
    """A model with latents outside its data plate, so that its datapoints have no density of their own.

    Attributes:
        plate: the data plate's name.
        names: the latent sites outside.
        subsampled: whether the plate is.
        summed_out: whether all latents inside are discrete.
        hierarchy: what the model and the guide are given the shared latents, see `Hierarchy`; None without a guide.
        remedy: what to do, where that is not `plate=False`.
    """

    def __init__(
        self,
        plate: str,
        names: Sequence[str],
        *,
        subsampled: bool = False,
        summed_out: bool = False,
        hierarchy: Any = None,
        remedy: str = "",
    ) -> None:
        self.plate, self.names, self.hierarchy, self.remedy = plate, tuple(names), hierarchy, remedy
        self.subsampled, self.summed_out = subsampled, summed_out
        several = len(self.names) > 1
        sites = ", ".join(map(repr, self.names))
        whole = "Remove the plate's subsampling and pass plate=False" if subsampled else "Pass plate=False"
        usual = (
            f"decompose measures gaps given draws of {'them' if several else 'it'}. {whole} to treat the whole data "
            "set as one datapoint"
        )
        super().__init__(
            f"site{'s' * several} {sites}: outside the data plate '{plate}', so shared by all datapoints, which have "
            f"no density of their own. {remedy or usual}"
        )

    def split_by(self, hierarchy: Any) -> "SharedLatents":
        """The same, with what the guide is given the shared latents."""
        return self._with(hierarchy=hierarchy, remedy=self.remedy)

    def _with(self, **other: Any) -> "SharedLatents":
        kept: dict[str, Any] = {"subsampled": self.subsampled, "summed_out": self.summed_out}
        return SharedLatents(self.plate, self.names, **kept, **other)


@contextmanager
def datapoints_needed(remedy: str) -> Iterator[None]:
    """Give `SharedLatents` another remedy than to treat the data set as one datapoint, which would be refused next."""
    try:
        yield
    except SharedLatents as found:
        raise found._with(remedy=remedy) from None


def data_plate(sites: Mapping[str, Any]) -> tuple[str | None, str]:
    """The data plate's name, from the sites of a run of the model, and why there is none.

    It is the one plate that encloses every observed site and some latent. Where plates enclose all observed sites but
    no latent, the whole data set is one datapoint, and the second value says why; else that is empty.
    """
    around = plates_around_observed(sites)
    with_latents = [name for name in around if latents_of(sites, name)[0]]
    if len(with_latents) == 1:
        return with_latents[0], ""
    if around and not with_latents:
        return None, no_local_latent(around)
    return find_plate(dict(sites)), ""


def no_local_latent(plates: Sequence[str]) -> str:
    """Why the whole data set is one datapoint, where no latent lies in any of `plates`."""
    return f"no latent lies in the plate{'s' * (len(plates) > 1)} {', '.join(map(repr, plates))}"


def plates_around_observed(sites: Mapping[str, Any]) -> list[str]:
    """Names of the plates that enclose every observed site."""
    frames = [{f.name for f in site["cond_indep_stack"]} for site in sites.values() if site["is_observed"]]
    return sorted(set.intersection(*frames)) if frames else []


def latents_of(sites: Mapping[str, Any], plate: str) -> tuple[list[str], list[str]]:
    """Names of the latent sites inside the plate, and of those outside."""
    inside: list[str] = []
    outside: list[str] = []
    for name, site in sites.items():
        if not site["is_observed"]:
            (inside if is_inside(site, plate) else outside).append(name)
    return inside, outside


def is_inside(site: Any, plate: str) -> bool:
    """Whether the plate encloses a site."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def check_shared(sites: Mapping[str, Any], plate: str) -> str:
    """Raise `SharedLatents` where some latents lie inside the plate and some outside.

    Returns why the whole data set is one datapoint, where no latent lies inside a plate of all observed sites; else "".
    """
    inside, outside = latents_of(sites, plate)
    if not outside or plate not in plates_around_observed(sites):
        return ""
    if not inside:
        return no_local_latent([plate])
    frames = [frame for site in sites.values() for frame in site["cond_indep_stack"] if frame.name == plate]
    subsampled = any(frame.full_size is not None and frame.size != frame.full_size for frame in frames)
    summed_out = all(is_discrete(sites[name]["fn"]) for name in inside)
    raise SharedLatents(plate, outside, subsampled=subsampled, summed_out=summed_out)
