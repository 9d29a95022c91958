"""The table of a calibration: one row per latent dimension, with significant deviations in words."""

from dataclasses import asdict

import numpy as np
import pandas as pd

from pyrogaps.calibration.statistics import covered, holm, marginal, proportion
from pyrogaps.tables import Frame

FAMILY_WISE = 0.01  # the probability of any finding at all where the posterior is calibrated
LOG_JOINT = "log p(x, z)"
TESTS = ["p_uniform", "p_shift", "p_spread"]
NARROW, WIDE, LOW, HIGH, MISSHAPEN = "too narrow", "too wide", "too low", "too high", "misshapen"


def summarise(labels: list[str], pit: np.ndarray, log_joint: np.ndarray) -> pd.DataFrame:
    """The summary of normalised ranks `pit` `(N, dim)`, and `log_joint` `(N,)` of log p(x, z); see `Calibration`."""
    table = Frame([asdict(marginal(column)) for column in (*pit.T, log_joint)], [*labels, LOG_JOINT])
    active = np.isfinite(pit)
    for percent in (50, 95):
        share, error = proportion(covered(pit, percent / 100), active)
        table[f"coverage_{percent}"], table[f"coverage_{percent}_error"] = [*share, np.nan], [*error, np.nan]
    # The draws' densities may spread in any way; only their location shows whether draws are as good as the truth.
    table.loc[LOG_JOINT, ["spread", "spread_error", "p_spread"]] = np.nan
    table[TESTS] = holm(table[TESTS].to_numpy())
    table["finding"] = [_finding(row) for _, row in table.iterrows()]
    # p-values and findings last
    table = table[[*(name for name in table if name not in (*TESTS, "finding")), *TESTS, "finding"]]
    return table.rename_axis("latent")


def deviating(summary: pd.DataFrame) -> pd.DataFrame:
    """The latent dimensions with a finding, the worst first.

    They are ordered by the divergence of a Normal with their shift and spread from the standard Normal: a shift by one
    standard deviation ranks about as high as a spread of two.
    """
    rows = summary[(summary["finding"] != "") & (summary.index != LOG_JOINT)]
    divergence = (rows["spread"] ** 2 + rows["shift"] ** 2 - 1) / 2 - np.log(rows["spread"])
    return rows.iloc[np.argsort(-divergence.to_numpy(), kind="stable")]


def _finding(row: pd.Series) -> str:
    """Significant deviations of the posterior from the truth, in words."""
    words = []
    if row["p_shift"] < FAMILY_WISE:
        words.append(LOW if row["shift"] > 0 else HIGH)
    if row["p_spread"] < FAMILY_WISE:
        words.append(NARROW if row["spread"] > 1 else WIDE)
    if not words and row["p_uniform"] < FAMILY_WISE:
        words.append(MISSHAPEN)
    return ", ".join(words)
