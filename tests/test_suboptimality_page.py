"""The judge of the published claims: on the paper's own table it must agree, and it must be able to disagree."""

import pandas as pd
import pytest

from benchmarks.suboptimality_page import CLAIMS, PAPER, Margin, Table, page, verdict


def paper_table(error: float = 0.05) -> pd.DataFrame:
    """The paper's numbers as a table of ours."""
    rows = []
    for column, (evidence, flow, ffg, elbo) in PAPER.items():
        own = flow if "flow" in column else ffg
        values = {
            "log_evidence": evidence,
            "elbo_refined_flow": flow,
            "elbo_refined_ffg": ffg,
            "elbo": elbo,
            "approximation_gap": evidence - own,
            "amortization_gap": own - elbo,
            "inference_gap": evidence - elbo,
            "flow_minus_ffg": flow - ffg,
            "iwae_5000": evidence - 0.3,
        }
        row = {"column": column, "status": "done", "num_epochs": 3280, "seed": 0, "machine": "the authors'"}
        row["entropy_annealing"] = 0 if "no-anneal" in column else 400
        row |= {"sandwich_width": 0.1, "sandwich_width_mcse": 0.01}
        for part in ("test", "train"):
            for name, value in values.items():
                row |= {f"{part}_{name}": value, f"{part}_{name}_se": error, f"{part}_{name}_mcse": 0.01}
            row |= {f"{part}_converged_flow": 1.0, f"{part}_converged_ffg": 1.0}
        rows.append(row)
    return pd.DataFrame(rows)


def test_every_claim_holds_in_the_papers_own_table() -> None:
    table = Table(paper_table(0.01), "test")
    for claim in CLAIMS:
        assert verdict(claim.margins(table)) == "holds", claim.claim


@pytest.mark.parametrize(
    ("number", "column", "quantity", "value"),
    [
        (0, "mnist-flow", "approximation_gap", 5.0),
        (1, "fashion-ffg", "amortization_gap", 1.0),
        (2, "mnist-flow-large", "flow_minus_ffg", 3.0),
        (3, "mnist-flow-no-anneal", "flow_minus_ffg", 12.0),
    ],
)
def test_a_claim_can_fail(number: int, column: str, quantity: str, value: float) -> None:
    table = paper_table()
    table.loc[table["column"] == column, f"test_{quantity}"] = value
    assert verdict(CLAIMS[number].margins(Table(table, "test"))) == "does not hold"


def test_annealing_is_read_from_the_table() -> None:
    table = paper_table()
    table.loc[0, "entropy_annealing"] = 0
    assert verdict(CLAIMS[4].margins(Table(table, "test"))) == "does not hold"


def test_margins_within_error() -> None:
    assert verdict([Margin("", 1.0, 0.1), Margin("", 0.1, 0.1)]) == "within error"
    assert verdict([Margin("", 1.0, 0.1), Margin("", -0.3, 0.1)]) == "does not hold"


def test_page_of_some_columns_judges_what_it_can() -> None:
    table = paper_table()
    some = table[table["column"].str.startswith("mnist")].copy()
    failed = {"column": "fashion-flow", "status": "training: epoch 3: the loss is nan", "num_epochs": 3280}
    text = page(pd.concat([some, pd.DataFrame([failed])]))
    assert "**6 of 12 columns measured.**" in text
    assert "Not judged: fashion-ffg, fashion-flow, fashion-ffg-large, fashion-flow-large not measured yet." in text
    assert "- fashion-flow: training: epoch 3: the loss is nan" in text
    assert text.count("**holds**") == 1
    assert "| mnist-ffg | -89.85 ± 0.05 |" in text


def test_page_before_anything_is_measured() -> None:
    failed = {"column": "mnist-ffg", "status": "training: epoch 3: the loss is nan", "num_epochs": 3280}
    text = page(pd.DataFrame([{**failed, "seed": 0, "machine": None}]))
    assert "**0 of 12 columns measured.**" in text
    assert "Made on: nothing measured yet" in text
    assert text.count("Not judged") == len(CLAIMS)


def test_a_flow_that_was_not_refined_enough_is_shown_and_not_judged() -> None:
    table = paper_table(0.01)
    table.loc[table["column"] == "mnist-flow", "status"] = "flow not refined enough"
    text = page(table)
    assert "**12 of 12 columns measured.**" in text
    assert "| mnist-flow (flagged, see the end) | -88.82 ± 0.01 |" in text
    assert "Not judged: mnist-flow flagged." in text
    assert "- mnist-flow: flow not refined enough" in text


def test_page_of_the_plain_flow() -> None:
    table = paper_table(0.01)
    table["column"] = table["column"].str.replace("-flow", "-coupling")
    text = page(table, "coupling")
    assert text.count("**holds**") == len(CLAIMS)
    assert "| mnist-coupling: (L[q*_Flow] - L[q*_FFG]) - 10 | 2.48 ± 0.01 |" in text
    assert "--flow coupling" in text
    assert "mnist-flow" not in text
