"""Gaps while Lightning trains, where it is installed."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyrogaps as pg
from pyrogaps.adapters.lightning import PACKAGES, gap_callback

X = (torch.rand(24, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()
FEW: dict[str, Any] = {"refinement": pg.Refinement(num_steps=4, num_selection=16), "evidence": pg.AIS(4, 4)}


def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PACKAGES:
            try:
                return __import__(name, fromlist=["Trainer"])
            except ImportError:
                continue
    pytest.skip("Lightning is not installed")


def fitted(folder: Path, make: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
    """A module after three epochs, and the trainer."""
    lightning = library()

    class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Sequential(nn.Dropout(0.2), nn.Linear(2, 6))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            (x,) = batch
            mean, logvar = self.encoder(x).chunk(2, -1)
            logits = self.decoder(mean + (logvar / 2).exp() * torch.randn_like(mean))
            kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum()
            return (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl) / len(x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    lit = Lit()
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [] if make is None else [make(lit)]
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **options
    )
    trainer.fit(lit, DataLoader(TensorDataset(X), batch_size=8, shuffle=True))
    return lit, trainer


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_calls_the_monitor_and_trains_as_without(tmp_path: Path) -> None:
    kept = []

    def pair(lit: Any) -> tuple[Any, Any]:
        return pg.from_torch(
            lambda x: lit.encoder(x).chunk(2, -1), lit.decoder, likelihood="bernoulli", second="log_variance"
        )

    def make(lit: Any) -> Any:
        kept.append(gap_callback(pair, X, every=2, datapoints=8, num_particles=50, **FEW))
        return kept[0]

    plain, _ = fitted(tmp_path)
    watched, trainer = fitted(tmp_path, make)
    monitor = kept[0].monitor
    assert [*monitor.history.index] == [2]
    assert float(trainer.callback_metrics["gaps/inference_gap"]) == pytest.approx(
        monitor.history["inference_gap"].iloc[0], rel=1e-5
    )
    assert watched.training
    for before, after in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(before, after)


def test_lightning_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(pg.InputError, match=r"Lightning is not installed\. Run: pip install lightning"):
        gap_callback(lambda lit: (lit, lit), X)
