"""Writers against the libraries themselves, without network; skipped where these are not installed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.writers import MLflow, TensorBoard, WandB, Writer

pytestmark = [
    pytest.mark.usefixtures("brief_check"),
    # Of the libraries themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]


def trained(writer: Writer) -> pg.GapMonitor:
    """A monitor that has written epochs 2 and 4."""
    torch.manual_seed(0)
    model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (5,)), torch.randn(20, 4)
    budget: dict[str, Any] = {
        "evidence": pg.Ladder(tolerance=1.0, max_evaluations=100),
        "refinement": pg.Refinement(num_steps=4, num_selection=8),
    }
    monitor = pg.GapMonitor(model, guide, x, every=2, datapoints=8, num_particles=20, writers=[writer], **budget)
    pg.train(model, guide, x, num_epochs=4, callback=monitor, progress=False)
    return monitor


def expected(monitor: pg.GapMonitor) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, from the history."""
    history = monitor.history.drop(columns=["cautions", "failure"])
    assert [*history.index] == [2, 4]
    assert "inference_gap" in history and "reliable" in history
    return {f"gaps/{name}": [*history[name].items()] for name in history}  # type: ignore[misc]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    own = SummaryWriter(str(tmp_path / "own"))
    for target, folder in ((tmp_path / "runs", "runs"), (own, "own")):
        monitor = trained(TensorBoard(target))
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        for name, values in expected(monitor).items():
            read = [(event.step, event.value) for event in events.Scalars(name)]
            assert [step for step, _ in read] == [2, 4]
            assert [value for _, value in read] == pytest.approx([value for _, value in values], rel=1e-6)
    own.close()


def test_wandb_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(pg.InputError, match=r"no active run of Weights & Biases. Call wandb.init\(\)"):
        WandB()
    run = wandb.init(mode="offline", dir=tmp_path, project="gaps")
    try:
        for _ in range(50):  # a loop of the caller's own is ahead of the monitor
            run.log({"loss": 1.0})
        monitor = trained(WandB())
        for name, values in expected(monitor).items():
            assert run.summary[name] == pytest.approx(values[-1][1])
        assert run.summary["gaps/step"] == 4
    finally:
        run.finish()
    assert [*tmp_path.glob("wandb/offline-run-*/*.wandb")]


def test_mlflow_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    mlflow.set_experiment("gaps")
    with mlflow.start_run() as run:
        monitors = [trained(MLflow())]
    other = mlflow.MlflowClient().create_run(run.info.experiment_id)
    monitors.append(trained(MLflow(other.info.run_id)))
    for monitor, run_id in zip(monitors, (run.info.run_id, other.info.run_id), strict=True):
        for name, values in expected(monitor).items():
            metrics = mlflow.MlflowClient().get_metric_history(run_id, name)
            read = sorted((metric.step, metric.value) for metric in metrics)
            assert [step for step, _ in read] == [2, 4]
            assert [value for _, value in read] == pytest.approx([value for _, value in values])


@pytest.mark.parametrize(
    ("make", "package"), [(lambda: TensorBoard("runs"), "tensorboard"), (WandB, "wandb"), (MLflow, "mlflow")]
)
def test_a_missing_library_is_named_with_what_to_install(
    make: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", package))]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, *args: Any) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(pg.InputError) as caught:
        make()
    assert str(caught.value) == f"writers: {package} is not installed. Run: pip install {package}"


def test_import_pyrogaps_loads_none_of_them() -> None:
    import subprocess

    code = "import sys, pyrogaps; print([n for n in ('tensorboard', 'wandb', 'mlflow') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
