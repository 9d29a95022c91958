"""The benchmark of MAPA, for seconds: a row for every method, nothing trained again, failures said, figures drawn."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import reporting
from benchmarks.mapa import __main__ as mapa
from benchmarks.mapa import circle, decoders, evaluation, posteriors, priors, runs, training
from benchmarks.mapa.figures import figures
from benchmarks.mapa.findings import findings
from benchmarks.mapa.intuition import of_two_minds
from benchmarks.mapa.uniform import uniform_posterior
from pyrogaps.models.synthetic import SyntheticData, SyntheticModel


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the place of `benchmarks/results`, runs with the least S alone, and none but their own picture."""
    for module in (mapa, reporting):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(mapa, "figures", lambda *_: None)
    monkeypatch.setattr(runs, "SAMPLES", (3,))
    monkeypatch.setattr(evaluation, "NUM_SAMPLES", 3)
    return tmp_path / "results"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> pd.DataFrame:
    monkeypatch.setattr("sys.argv", ["benchmark", "--quick", "--runs", str(folder), *arguments])
    mapa.main()
    return pd.read_csv(folder / "results" / "mapa-quick.csv").set_index(["data set", "method"])


def test_every_method_has_a_row_and_none_is_trained_again(
    monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = run(monkeypatch, tmp_path, "circle")
    assert set(table.index) == {("circle", name) for name in (runs.VAE, *runs.METHODS)}
    assert table["KL"].notna().all()
    assert (table["draws"] == 2).all()
    assert (table["steps"] == 20).all()
    passes = table["decoder passes per point"]["circle"]
    assert passes[[runs.VAE, runs.IWAE]].round(1).tolist() == [1, 3]
    assert (tmp_path / "quick" / "mapa.png").stat().st_size > 0
    assert "IWAE with the same S:\n  circle, S = 3: decoder" in capsys.readouterr().out

    def again(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "trained", again)
    pd.testing.assert_frame_equal(run(monkeypatch, tmp_path, "circle"), table)


@pytest.mark.parametrize(("method", "number"), [(runs.VAE, 1), *((method, 3) for method in runs.METHODS)])
def test_every_loss_trains_both_networks(method: str, number: int) -> None:
    data = SyntheticData("circle", 60, 1, 1)
    model, guide = training.untrained(method, data)
    before = [value.clone() for value in (*model.parameters(), *guide.parameters())]
    training.fit(model, guide, training.loss_of(method, number, data, 0), data.train, 2)
    after = [*model.parameters(), *guide.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_training_that_diverged_is_counted(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    def diverged(*_: object) -> None:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(runs, "trained", diverged)
    table = run(monkeypatch, tmp_path, "circle", "--draws", "1")
    assert (table["failed restarts"] == 1).all()
    assert table["KL"].isna().all()


def test_findings_are_judged_by_two_standard_errors() -> None:
    kl = {"VAE": (1, (0.5, 0.6, 0.7)), "IWAE": (3, (0.5, 0.1, 0.3)), "MAPA": (3, (0.1, 0.1, 0.1))}
    rows = [["circle", method, s, draw, value] for method, (s, draws) in kl.items() for draw, value in enumerate(draws)]
    best = pd.DataFrame(rows, columns=[*runs.KEY, "draw", "divergence"])
    table = pd.DataFrame(columns=list(runs.COLUMNS))
    lines = [line for line in findings(best, table) if "circle" in line]
    assert lines == ["  circle, S = 3: VAE +0.500 ± 0.058, IWAE +0.200 ± 0.115: undecided"]
    best.loc[best["method"] == "IWAE", "divergence"] = 0.4
    assert "MAPA is better" in "".join(findings(best, table))
    best.loc[best["method"] == "VAE", "divergence"] = [0.0, 0.01, 0.0]
    assert "MAPA is worse" in "".join(findings(best, table))


def test_unknown_data_set_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, tmp_path, "square")
    assert error.value.code == 2


def options(folder: Path, num_steps: int | None) -> runs.Options:
    return runs.Options(folder, True, 1, 1, num_steps, 60, 30, 0)


def test_a_data_set_has_its_number_of_steps_unless_another_is_given(tmp_path: Path) -> None:
    usual, given = options(tmp_path, None), options(tmp_path, 7)
    assert [usual.steps(name) for name in ("circle", "spiral-dots")] == [1200, 4000]
    assert [given.steps(name) for name in ("circle", "spiral-dots")] == [7, 7]
    assert usual.folder("spiral-dots") == tmp_path / "60-datapoints-4000-steps-seed-0" / "spiral-dots"
    for number, name in enumerate(("circle", "spiral-dots")):
        runs.write_json(usual.folder(name), "VAE-1-draw-0-restart-0.json", {"validation": 1.0, "divergence": number})
    best = runs.best_runs(usual)
    assert runs.summary(best)[["data set", "steps", "KL"]].to_numpy().tolist() == [
        ["circle", 1200, 0.0],
        ["spiral-dots", 4000, 1.0],
    ]


@pytest.mark.slow
def test_evaluation_is_of_the_best_models_and_made_once(
    monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path
) -> None:
    training_run = run(monkeypatch, tmp_path, "circle", "--draws", "1", "--evaluate")
    table = pd.read_csv(results / "mapa_evaluation-quick.csv").set_index("model")
    assert set(table.index) == {"truth", runs.VAE, *runs.METHODS}
    # What was trained again is the model that the run measured.
    assert table["KL"][list(runs.METHODS)].to_numpy() == pytest.approx(training_run["KL"]["circle"][list(runs.METHODS)])
    assert (table["log p(x)"] - table["log p(x) by IWAE"]).to_numpy() == pytest.approx(table["difference"], abs=1e-9)
    assert abs(table["difference"]["truth"]) < 5 * table["standard error"]["truth"]

    def again(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    for module, name in ((runs, "trained"), (evaluation, "evaluated")):
        monkeypatch.setattr(module, name, again)
    run(monkeypatch, tmp_path, "circle", "--draws", "1", "--evaluate")
    pd.testing.assert_frame_equal(pd.read_csv(results / "mapa_evaluation-quick.csv").set_index("model"), table)


@pytest.mark.parametrize("method", [runs.VAE, runs.MAPA])
def test_weights_that_are_kept_give_the_same_model(method: str, tmp_path: Path) -> None:
    few, data = options(tmp_path, 5), SyntheticData("circle", 60, 60, 30)
    few.folder("circle").mkdir(parents=True)
    job = runs.Job("circle", 0, method, 3, 0)
    expected = runs.train(job, data, few).model.log_evidence(data.test)
    for _ in range(2):
        assert torch.equal(evaluation.retrained(job, data, few).log_evidence(data.test), expected)


@pytest.mark.slow
def test_figures_are_drawn_and_distances_written(results: Path, tmp_path: Path) -> None:
    figures(["circle"], options(tmp_path, None), tmp_path)
    for name in ("mapa_intuition", "mapa_posteriors", "mapa_decoders"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    distances = pd.read_csv(results / "mapa_posteriors-quick.csv").set_index("posterior")["from the true posterior"]
    assert distances["empiricalized"] < distances["MAPA"] < 0.5 * distances["uniform"]


def test_uniform_posterior() -> None:
    x = torch.arange(24.0).reshape(12, 2)
    posterior = uniform_posterior(x, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(posterior.log_q, torch.full((12, 12), -math.log(12), dtype=torch.float64))
    assert torch.equal(posterior.indices[:, 0].long(), torch.arange(12))
    assert all(len(row.unique()) == 12 for row in posterior.indices)


def test_smoothed_posteriors_are_densities() -> None:
    data = SyntheticData("absolute-value", 200, 1, 1)
    step = posteriors.LINE[1] - posteriors.LINE[0]
    found = posteriors.over_datapoints(data)
    for density in (posteriors.smoothed(q, data.latents["train"]) for q in found.values()):
        assert torch.allclose(density.sum(1) * step, torch.ones(200, dtype=torch.float64), atol=1e-6)
    truth = posteriors.true_posterior(data.truth, data.train)
    assert torch.allclose(truth.sum(1) * step, torch.ones(200, dtype=torch.float64), atol=1e-4)


def test_empiricalized_posterior_tends_to_the_true_one() -> None:
    few, many = (next(posteriors.distances("circle", SyntheticData("circle", number, 1, 1)))[2] for number in (50, 800))
    assert many < 0.5 * few


def test_both_decoders_explain_a_datapoint_by_the_same_place() -> None:
    data = SyntheticData("absolute-value", 200, 1, 1)
    places = [model.decoder(z) for model, z in decoders.variants(data).values()]
    assert (places[0] - places[1]).norm(dim=1).max() < 0.2 * data.truth.variance.sqrt()


def test_datapoint_of_two_minds() -> None:
    data = SyntheticData("figure-8", 300, 1, 1)
    row = of_two_minds(data)
    density = posteriors.true_posterior(data.truth, data.train[row : row + 1])[0]
    peaks = (density[1:-1] > density[:-2]) & (density[1:-1] > density[2:]) & (density[1:-1] > 0.1 * density.max())
    assert peaks.sum() == 2


@pytest.mark.slow
def test_the_circle_under_several_priors(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["circle", "--quick", "--runs", str(tmp_path)])
    circle.main()
    table = pd.read_csv(results / "mapa_circle-quick.csv").set_index(["model", "prior"])
    assert set(table.loc[circle.TRUTH].index) >= {priors.AGGREGATED, circle.AS_THEY_ARE, circle.BEST}
    assert set(table.loc[runs.VAE].index) == {circle.STANDARD, circle.BEST}
    assert float(table["off the circle"][circle.TRUTH].max()) == 0.0
    monkeypatch.setattr(circle, "fitted", None)  # nothing is trained again
    circle.main()


def test_a_grid_along_the_curve_has_equal_steps() -> None:
    model = SyntheticModel("circle", "exact")
    z = priors.along(model, torch.tensor([[-3.0], [3.0]]))
    steps = model.decoder(z[:, None]).diff(dim=0).norm(dim=1)
    assert z[0] == -3 and z[-1] == 3 and bool((z.diff() > 0).all())
    assert float(steps.max()) < 1.05 * priors.SPACING * float(model.variance) ** 0.5
    assert float(steps.max()) < 1.1 * float(steps.min())
