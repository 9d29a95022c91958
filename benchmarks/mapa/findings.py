"""What the paper found, judged from the table alone: differences over the same draws of the data, in nats."""

from collections.abc import Iterator

import pandas as pd

from benchmarks.mapa.training import IWAE, MAPA, MAPA_NAIVE, VAE


def findings(best: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    """Lines on every data set for which there is what a comparison needs."""
    data_sets = list(dict.fromkeys(best["data set"]))
    yield "The paper: MAPA is better than VAE and IWAE on all but clusters. KL of each minus KL of MAPA, nats:"
    for data_set in data_sets:
        yield from _against(best, data_set, (VAE, IWAE))
    yield "The paper: MAPA-naive is poor. KL of MAPA-naive minus KL of MAPA, nats:"
    for data_set in data_sets:
        yield from _against(best, data_set, (MAPA_NAIVE,))
    yield "The paper: MAPA takes fewer forward passes. Passes per point over those of IWAE with the same S:"
    for data_set in data_sets:
        yield from _passes(table, data_set)


def _against(best: pd.DataFrame, data_set: str, others: tuple[str, ...]) -> Iterator[str]:
    """For every S, the mean difference over draws, its standard error, and what follows for MAPA."""
    for number in sorted({*best["S"]} - {1}):
        margins = {other: _margins(best, data_set, other, number) for other in others}
        if all(len(values) for values in margins.values()):
            texts = [f"{other} {values.mean():+.3f} ± {values.sem():.3f}" for other, values in margins.items()]
            yield f"  {data_set}, S = {number}: {', '.join(texts)}: {_verdict([*margins.values()])}"


def _margins(best: pd.DataFrame, data_set: str, other: str, number: int) -> pd.Series:
    """KL(other) - KL(MAPA), one for each draw that both have."""
    of = best[best["data set"] == data_set].set_index("draw")
    theirs = of[(of["method"] == other) & (of["S"] == (1 if other == VAE else number))]["divergence"]
    ours = of[(of["method"] == MAPA) & (of["S"] == number)]["divergence"]
    return (theirs - ours).dropna()


def _verdict(margins: list[pd.Series]) -> str:
    """What holds by two standard errors."""
    if any(len(values) < 2 for values in margins):
        return "one draw decides nothing"
    if all(values.mean() > 2 * values.sem() for values in margins):
        return "MAPA is better"
    if any(values.mean() < -2 * values.sem() for values in margins):
        return "MAPA is worse"
    return "undecided"


def _passes(table: pd.DataFrame, data_set: str) -> Iterator[str]:
    of = table[table["data set"] == data_set].set_index(["method", "S"])
    both = sorted(number for number in {*table["S"]} if {(MAPA, number), (IWAE, number)} <= {*of.index})
    parts = []
    for number in both:
        ours, theirs = of.loc[(MAPA, number)], of.loc[(IWAE, number)]
        decoder, encoder = "decoder passes per point", "encoder passes per point"
        whole = (ours[decoder] + ours[encoder]) / (theirs[decoder] + theirs[encoder])
        parts.append(f"S = {number}: decoder {ours[decoder] / theirs[decoder]:.2f}, with encoder {whole:.2f}")
    if parts:
        yield f"  {data_set}, {'; '.join(parts)}"
