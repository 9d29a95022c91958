"""Training: the objective, its annealing, schedules, early stopping, divergence and parameters of every style."""

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrogaps import IWAE_ELBO, iwae
from pyrogaps.density import IndexedData, as_indexed
from pyrogaps.errors import InputError
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.training import Constant, Cosine, Exponential, Schedule, Staircase, Training, TrainingResult, train
from pyrogaps.training.checkpoints import fingerprint
from pyrogaps.training.lagging import WINDOW, GuideAhead
from pyrogaps.training.objective import Objective
from pyrogaps.training.parameters import JointOptimizer
from pyrogaps.training.weighing import WeightLatents
from tests.references import NearPosterior, anisotropic, draws_of

quick: dict[str, Any] = {"progress": False, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def pair(hidden: tuple[int, ...] = ()) -> tuple[LinearGaussian, AmortizedNormal]:
    torch.manual_seed(1)
    return LinearGaussian.random(4, 2, noise_scale=0.7), AmortizedNormal(4, 2, hidden)


def data(num_datapoints: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_datapoints, 2, generator=generator) @ torch.randn(2, 4, generator=generator)


def elbo_of(model: LinearGaussian, guide: AmortizedNormal, x: Tensor) -> float:
    mean, scale = guide.parameters_of(x)
    return model.elbo(x, mean, scale=scale).mean().item()


def test_training_finds_the_optimum_of_its_family() -> None:
    # The best linear encoder is the exact mean-field optimum here, so every gap but the approximation gap closes.
    model, guide = pair()
    x = data(400)
    result = train(model, guide, x, num_epochs=60, learning_rate=5e-2, schedule=Cosine(60), freeze_model=True,
                   num_particles=4, progress=False)  # fmt: skip
    mean, scale = guide.parameters_of(x)
    assert model.amortization_gap(x, mean, scale).mean().item() < 0.005
    # At the optimum the noise of the last epoch's ELBO is that of 400 x 4 draws.
    assert abs(result.train_elbo - elbo_of(model, guide, x)) < 4 * math.sqrt(2 / 1600)


def test_training_the_model_raises_the_evidence() -> None:
    model, guide = pair()
    x = data()
    before = model.log_evidence(x).mean().item()
    result = train(model, guide, x, num_epochs=60, batch_size=20, **quick)
    assert model.log_evidence(x).mean().item() > before + 1
    assert len(result.history["train_elbo"]) == result.num_epochs == result.best_epoch == 60
    assert not result.stopped_early and result.validation_elbo is None


@pytest.mark.parametrize(("beta", "entropy_weight"), [(1.0, 1.0), (0.3, 1.0), (1.0, 0.25), (0.0, 1.0), (0.5, 0.0)])
def test_objective_weighs_latents_and_reports_the_plain_elbo(beta: float, entropy_weight: float) -> None:
    model, guide = pair()
    x = data(7)
    torch.manual_seed(3)
    guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    likelihood, prior, q = (
        trace.nodes[name]["log_prob_sum"] / 7
        for trace, name in ((model_trace, "x"), (model_trace, "z"), (guide_trace, "z"))
    )
    objective = Objective(model, guide, num_particles=1)
    objective.anneal(beta, entropy_weight)
    objective.begin(7)
    torch.manual_seed(3)
    loss = objective.loss_and_grads(objective.model, objective.guide, x)
    assert loss == pytest.approx(-(likelihood + beta * (prior - entropy_weight * q)).item(), rel=1e-5)
    assert objective.elbo == pytest.approx((likelihood + prior - q).item(), rel=1e-5)


def test_weight_zero_is_zero_even_where_the_log_probability_is_infinite() -> None:
    def model() -> None:
        pyro.sample("z", dist.Uniform(0.0, 1.0, validate_args=False))

    weight = WeightLatents()
    weight.weight = 0.0
    trace = poutine.trace(weight(poutine.condition(model, data={}))).get_trace()
    trace.nodes["z"]["value"] = torch.tensor(2.0)
    assert trace.nodes["z"]["fn"].log_prob(torch.tensor(2.0)) == -math.inf
    assert trace.log_prob_sum() == 0


def test_first_epoch_of_warm_up_ignores_prior_and_guide_scores() -> None:
    # With beta = 0 the scale can only help the likelihood, so it shrinks.
    model, guide = pair()
    x = data()
    before = guide.parameters_of(x)[1].mean().item()
    train(model, guide, x, num_epochs=1, batch_size=5, kl_warmup=10, freeze_model=True, **quick)
    assert guide.parameters_of(x)[1].mean().item() < before


def test_warm_up_and_annealing_ramps() -> None:
    settings = Training(kl_warmup=4, entropy_annealing=2)
    assert [settings.beta(epoch) for epoch in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [settings.entropy_weight(epoch) for epoch in range(4)] == [0, 0.5, 1, 1]
    assert [settings.annealed(epoch) for epoch in (3, 4)] == [False, True]
    assert Training().beta(0) == Training().entropy_weight(0) == 1


def test_schedules() -> None:
    assert Constant()(7) == 1
    assert Exponential(0.5)(3) == 0.125
    assert [round(Cosine(5, final=0.2)(epoch), 6) for epoch in (0, 2, 4, 9)] == [1.0, 0.6, 0.2, 0.2]
    assert Cosine(1)(0) == 1


def test_staircase_takes_three_to_the_i_epochs_per_stage() -> None:
    multipliers = [Staircase()(epoch) for epoch in range(3280)]
    for i in range(8):
        assert sum(math.isclose(value, 10 ** (-i / 7)) for value in multipliers) == 3**i
    assert multipliers == sorted(multipliers, reverse=True)
    assert Staircase()(5000) == pytest.approx(0.1)
    stretched = [Staircase(2 * 3280)(epoch) for epoch in range(2 * 3280)]
    assert stretched[::2] == stretched[1::2] == multipliers


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exponential(0.0), lambda: Cosine(0), lambda: Cosine(3, 2.0), lambda: Staircase(0),
        lambda: Staircase(10, 1), lambda: Training(num_epochs=0), lambda: Training(batch_size=0),
        lambda: Training(kl_warmup=-1), lambda: Training(learning_rate=0.0), lambda: Training(clip_norm=0.0),
        lambda: Training(patience=0), lambda: Training(num_particles=0), lambda: Training(guide_steps=-1),
        lambda: Training(guide_steps=2, freeze_model=True), lambda: Training(objective=RenyiELBO()),
        lambda: Training(objective=IWAE_ELBO(2), num_particles=2),
        lambda: Training(objective=IWAE_ELBO(2), kl_warmup=2),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        make()


def test_train_and_training_have_the_same_settings() -> None:
    parameters = inspect.signature(train).parameters
    for field in fields(Training):
        if field.name != "optimizer_options":
            assert parameters[field.name].default == getattr(Training(), field.name)
    model, guide = pair()
    settings = Training(num_epochs=2, batch_size=30, schedule=Exponential(0.5), optimizer_options={"eps": 1e-4})
    result = train(model, guide, data(), **vars(settings), progress=False)
    assert result.history["learning_rate"] == [1e-3, 5e-4]


def test_recipes_can_build_the_settings() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--training", type=Training)
    schedule = {"class_path": "pyrogaps.training.Staircase", "init_args": {"num_epochs": 50}}
    chosen = {
        "num_epochs": 50, "schedule": schedule, "optimizer": "torch.optim.AdamW",
        "optimizer_options": {"eps": 1e-4}, "clip_norm": 5,
    }  # fmt: skip
    settings = parser.instantiate(parser.parse_object({"training": chosen})).training
    assert settings == Training(50, 100, 1e-3, Staircase(50), torch.optim.AdamW, {"eps": 1e-4}, clip_norm=5)


def test_recipes_can_build_an_objective() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--training", type=Training)
    objective = {"class_path": "pyrogaps.IWAE_ELBO", "init_args": {"num_particles": 7, "doubly_reparametrised": True}}
    settings = parser.instantiate(parser.parse_object({"training": {"objective": objective}})).training
    assert settings == Training(objective=IWAE_ELBO(7, doubly_reparametrised=True))


def test_schedule_scales_the_learning_rate_of_the_optimizer() -> None:
    class Never(Schedule):
        def __call__(self, epoch: int) -> float:
            return 0.0

    model, guide = pair()
    before = [value.clone() for value in guide.parameters()]
    train(model, guide, data(), num_epochs=2, schedule=Never(), **quick)
    assert all(torch.equal(old, new) for old, new in zip(before, guide.parameters(), strict=True))


def test_clipping_bounds_the_norm_of_the_whole_gradient() -> None:
    model, guide = pair((5,))
    before = torch.cat([value.flatten().clone() for value in (*model.parameters(), *guide.parameters())])
    train(model, guide, 50 * data(), num_epochs=1, batch_size=60, learning_rate=1.0, clip_norm=0.1,
          optimizer=torch.optim.SGD, progress=False)  # fmt: skip
    after = torch.cat([value.flatten() for value in (*model.parameters(), *guide.parameters())])
    assert (after - before).norm().item() == pytest.approx(0.1, rel=1e-3)


# --- Other objectives, and the guide ahead of the model ---------------------------------------------------------


@pytest.mark.parametrize("doubly", [False, True])
def test_another_objective_is_trained_reported_and_selected_by(doubly: bool) -> None:
    model, guide = pair()
    x = data()
    objective = IWAE_ELBO(20, doubly_reparametrised=doubly, vectorize_particles=True)
    before = iwae(model, guide, x, num_particles=20).value.mean()
    result = train(model, guide, x, num_epochs=40, batch_size=20, objective=objective, validation=x, **quick)
    after = iwae(model, guide, x, num_particles=20).value.mean().item()
    assert after > before + 1
    assert result.validation_elbo is not None
    assert abs(result.validation_elbo - after) < 0.1 < after - elbo_of(model, guide, x)
    assert result.validation_elbo == max(result.history["validation_elbo"])


def test_objective_counts_datapoints_as_the_elbo_does() -> None:
    """One particle of either is the same, per datapoint, with and without a plate that scales minibatches up."""
    x = data()[:20, :2]
    for size in (20, 60):

        def model(x: Tensor, size: int = size) -> None:
            with pyro.plate("data", size, subsample=torch.arange(len(x))):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.expand(len(x), 2), 0.5).to_event(1), obs=x)

        def guide(x: Tensor, size: int = size) -> None:
            with pyro.plate("data", size, subsample=torch.arange(len(x))):
                pyro.sample("z", dist.Normal(x[:, :1], 0.5).to_event(1))

        values = []
        for estimator in (None, IWAE_ELBO(1), Trace_ELBO()):
            objective = Objective(model, guide, 1, estimator)
            objective.begin(20)
            torch.manual_seed(3)
            values.append(objective.evaluate(x))
        assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])


def test_checkpoints_tell_objectives_apart_and_older_ones_stay_good(tmp_path: Path) -> None:
    known = fingerprint(Training(), seed=0, data=as_indexed(data()))
    assert not {"objective", "guide_steps"} & set(known)
    told = [fingerprint(Training(objective=o), seed=0)["objective"] for o in (IWAE_ELBO(2), IWAE_ELBO(3), Trace_ELBO())]
    assert len(set(told)) == 3
    assert told[2] == fingerprint(Training(objective=Trace_ELBO()), seed=0)["objective"]
    common: dict[str, Any] = {"num_epochs": 1, "checkpoint": tmp_path / "run.pt", **quick}
    train(*pair(), data(), objective=IWAE_ELBO(2), **common)
    with pytest.raises(InputError, match=r"objective IWAE_ELBO\(num_particles=2.*now IWAE_ELBO\(num_particles=3"):
        train(*pair(), data(), objective=IWAE_ELBO(3), **common)


@pytest.mark.parametrize("objective", [None, IWAE_ELBO(3, doubly_reparametrised=True)])
def test_the_guide_goes_ahead_and_a_resumed_run_is_the_unbroken_one(objective: Any, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"batch_size": 20, "guide_steps": 12, "objective": objective, **quick}
    whole = pair((5,))
    result = train(*whole, data(), num_epochs=4, **chosen)
    parts = pair((5,))
    train(*parts, data(), num_epochs=2, checkpoint=tmp_path / "run.pt", **chosen)
    parts = pair((5,))
    resumed = train(*parts, data(), num_epochs=4, checkpoint=tmp_path / "run.pt", **chosen)
    assert resumed == result
    for left, right in zip(whole, parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))
    found = result.history["mutual_information"]
    assert 2 <= len(found) <= 4 and all(value >= 0 for value in found)
    assert sorted(found[:-1]) == found[:-1]


def test_steps_ahead_move_the_guide_and_then_the_model_moves_alone() -> None:
    """Three epochs of one minibatch each: the model takes three steps; the guide, as many as its steps ahead."""
    model, guide = pair()
    moved: list[str] = []
    values = {"model": model.weight, "guide": guide.encoder[0].weight}
    last = {name: value.detach().clone() for name, value in values.items()}

    def watch() -> None:
        for name, value in values.items():
            if not torch.equal(last[name], value):
                moved.append(name)
                last[name] = value.detach().clone()

    class Watched(IWAE_ELBO):
        def differentiable_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            watch()
            return super().differentiable_loss(*args, **kwargs)

    train(model, guide, data(), num_epochs=1, batch_size=60, guide_steps=4, objective=Watched(1), **quick)
    watch()
    assert moved == ["guide"] * 4 + ["model"]


def test_steps_ahead_stop_where_the_loss_no_longer_falls() -> None:
    model = anisotropic(4, 2)
    x, _ = draws_of(model, 20)
    ahead = GuideAhead(model, NearPosterior(model), as_indexed(x), set(), limit=100)
    rows: list[Tensor] = []

    class Stub:
        def move_only(self, moves: Any) -> None:
            pass

    def losses(falling: int) -> Callable[[Tensor], float]:
        rows.clear()

        def step(indices: Tensor) -> float:
            rows.append(indices)
            return float(-min(len(rows), falling))

        return step

    batches = [torch.arange(10), torch.arange(10, 20)]
    ahead.run(losses(3 * WINDOW), Stub(), batches[1], batches)  # type: ignore[arg-type]
    assert len(rows) == 5 * WINDOW and rows[0] is batches[1]
    assert {int(each[0]) for each in rows} == {0, 10}
    ahead.run(losses(1000), Stub(), batches[1], batches)  # type: ignore[arg-type]
    assert len(rows) == 100
    assert ahead.is_active({}) and ahead.is_active({"mutual_information": [0.1, 0.3, 0.3]})
    assert not ahead.is_active({"mutual_information": [0.1, 0.3, 0.2]})
    assert not ahead.is_active({"mutual_information": [0.3, 0.2, 0.4]})


def test_mutual_information_of_the_exact_posterior() -> None:
    """Half the log-determinant of prior over posterior covariance, less what a mean of 256 posteriors leaves out."""
    model = anisotropic(4, 1)
    guide = NearPosterior(model, shift=0.0, width=1.0)
    exact = float((model.precision.logdet() / 2 + model.prior_scale.log().sum()).detach())
    found = []
    for seed in range(8):
        x, _ = draws_of(model, 300, seed=seed)
        found.append(GuideAhead(model, guide, as_indexed(x), set(), limit=1).mutual_information())
    error = torch.tensor(found).std().item() / math.sqrt(8)
    assert error < 0.02 < exact / 10
    assert abs(sum(found) / 8 - exact) < 4 * error + 1 / 256 * math.exp(exact)


def test_steps_ahead_need_a_guide_and_datapoints_of_their_own() -> None:
    net = nn.Linear(1, 2)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ net.weight, 1.0).to_event(1))

    with pytest.raises(InputError, match="guide_steps train the guide alone, but the guide shares parameter"):
        train(model, guide, data()[:, :2], guide_steps=5, **quick)

    def whole(x: Tensor) -> None:
        scale = pyro.param("scale", torch.ones(()))
        z = pyro.sample("z", dist.Normal(torch.zeros(()), scale))
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(2), obs=x)

    def whole_guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 0.1))

    with pytest.raises(InputError, match="needs a model with a data plate"):
        train(whole, whole_guide, data()[:, :2], guide_steps=5, **quick)


# --- Parameters of every style ----------------------------------------------------------------------------------


def plain_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.expand(len(x), 2), 0.5).to_event(1), obs=x)


def param_guide(x: Tensor) -> None:
    slope = pyro.param("slope", lambda: torch.zeros(2))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x @ slope)[:, None], scale).to_event(1))


class ParamGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(2))
        self.scale = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x @ self.slope)[:, None], self.scale).to_event(1))


class Example(nn.Module):
    """In the manner of Pyro's VAE example: `model` and `guide` are methods of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 2), nn.Linear(2, 2)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw) + 1e-3).to_event(1))


def pairs_of_every_style() -> dict[str, tuple[Any, Any]]:
    example, encoder = Example(), nn.Linear(2, 1)

    def closure(x: Tensor) -> None:
        pyro.module("net", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    return {
        "param": (plain_model, param_guide),
        "PyroModule": (plain_model, ParamGuide()),
        "methods": (example.model, example.guide),
        "pyro.module": (plain_model, closure),
    }


STYLES = ["param", "PyroModule", "methods", "pyro.module"]


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_trained(style: str) -> None:
    model, guide = pairs_of_every_style()[style]
    result = train(model, guide, data()[:, :2], num_epochs=30, batch_size=20, **quick)
    assert result.history["train_elbo"][-1] > result.history["train_elbo"][0] + 0.3


@pytest.mark.parametrize("style", ["methods", "pyro.module"])
def test_a_second_module_of_the_same_name_is_trained_too(style: str) -> None:
    train(*pairs_of_every_style()[style], data()[:, :2], num_epochs=1, **quick)
    model, guide = pairs_of_every_style()[style]
    result = train(model, guide, data()[:, :2], num_epochs=30, batch_size=20, **quick)
    assert result.history["train_elbo"][-1] > result.history["train_elbo"][0] + 0.3


def test_freeze_model_trains_the_guide_alone() -> None:
    example = Example()
    flat = nn.utils.parameters_to_vector
    decoder, encoder = flat(example.decoder.parameters()).clone(), flat(example.encoder.parameters()).clone()
    train(example.model, example.guide, data()[:, :2], num_epochs=1, freeze_model=True, **quick)
    assert torch.equal(flat(example.decoder.parameters()), decoder)
    assert not torch.equal(flat(example.encoder.parameters()), encoder)


def test_freeze_model_refuses_shared_parameters() -> None:
    model = nn.Linear(1, 2)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = model

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ self.decoder.weight, 1.0).to_event(1))

    class Decoding(Tied):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    with pytest.raises(InputError, match="shares parameter"):
        train(Decoding(), Tied(), data()[:, :2], num_epochs=1, freeze_model=True, **quick)


def test_nothing_to_train_is_refused() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(InputError, match="no trainable parameters"):
        train(plain_model, guide, data()[:, :2], **quick)


def test_unsuitable_optimizers_are_refused() -> None:
    with pytest.raises(InputError, match="LBFGS"):
        train(*pair(), data(), optimizer=torch.optim.LBFGS, **quick)
    with pytest.raises(InputError, match=r"optimizer Adam refuses .*momentum"):
        train(*pair(), data(), optimizer_options={"momentum": 0.9}, **quick)


def test_fused_kernels_are_the_default_where_there_are_some() -> None:
    def fused(kind: type[torch.optim.Optimizer], value: Tensor, **options: Any) -> bool:
        return bool(
            JointOptimizer(kind, {"lr": 0.1, **options}, {"value": value}).optimizer.param_groups[0].get("fused")
        )

    value = torch.zeros(2, requires_grad=True)
    assert fused(torch.optim.Adam, value) and fused(torch.optim.SGD, value)
    assert not fused(torch.optim.Adam, value, foreach=False) and not fused(torch.optim.Adam, value, fused=False)
    assert not fused(torch.optim.RMSprop, value)
    assert not fused(torch.optim.Adam, torch.zeros(2, device="meta", requires_grad=True))


# --- Minibatches ------------------------------------------------------------------------------------------------


def per_datapoint_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(len(x), 1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


@pytest.mark.parametrize("style", ["autoguide", "function"])
def test_a_guide_with_parameters_per_datapoint_needs_the_whole_data_set(style: str) -> None:
    x = data()[:, :2]
    guide = AutoNormal(plain_model) if style == "autoguide" else per_datapoint_guide
    with pytest.raises(InputError, match="parameters for each of 20 datapoints"):
        train(plain_model, guide, x, batch_size=20, **quick)
    with pytest.raises(InputError, match="validation"):
        train(plain_model, guide, x, batch_size=60, validation=x, **quick)
    # The refusals left nothing behind, and rows keep their places: the means follow the data.
    train(plain_model, guide, x, num_epochs=150, batch_size=60, progress=False, learning_rate=5e-2)
    loc = guide.median(x)["z"] if isinstance(guide, AutoNormal) else pyro.param("loc")
    exact = x.sum(1) / 0.25 / (1 + 2 / 0.25)
    assert torch.corrcoef(torch.stack([loc[:, 0].detach(), exact]))[0, 1] > 0.95


def test_an_autoguide_of_global_latents_takes_minibatches() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        with pyro.plate("data", 60, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    x = data()[:, :2] + 3
    guide = AutoNormal(model)
    result = train(model, guide, x, num_epochs=60, batch_size=20, learning_rate=5e-2, progress=False, validation=x)
    # The posterior's standard deviation is 1/sqrt(60); the bound counts the prior once, not once per minibatch.
    assert (guide.median()["mean"] - x.mean(0)).abs().max().item() < 4 / math.sqrt(60)
    evidence = dist.Normal(x.mean(0), 1.0).log_prob(x).sum(1).mean().item()
    assert evidence - 0.5 < result.train_elbo < evidence


def test_a_latent_that_the_guide_does_not_draw_is_refused() -> None:
    """Pyro warns and draws it from the prior: the loss is then no bound of the model's that sums it out."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z + k[:, None], 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True), 1.0).to_event(1))

    def both(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(1)).expand(len(x), 1), 1.0).to_event(1))
            pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))

    x = data()[:8, :2]
    with pytest.raises(InputError, match=r"site 'k': latent in the model but missing from the guide.*TraceEnum_ELBO"):
        train(model, guide, x, **quick)
    with pytest.raises(InputError, match=r"no observed sample site.*were model and guide swapped"):
        train(guide, model, x, **quick)
    train(model, both, x, **quick)


def test_a_hard_coded_plate_is_named() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 20):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.expand(20, 2), 0.5).to_event(1), obs=x)

    with pytest.raises(InputError, match="runs on 20 datapoints but not on 21"):
        train(model, param_guide, data()[:, :2], batch_size=20, **quick)


def test_plate_scaling_does_not_change_figures_or_steps() -> None:
    x = data()[:, :2]

    def run(subsampled: bool) -> tuple[TrainingResult, Tensor]:
        pyro.clear_param_store()

        def plate(rows: int) -> pyro.plate:
            # Given its indices a plate draws none, so both runs see the same noise.
            indices = torch.arange(rows)
            return pyro.plate("data", 60, subsample=indices) if subsampled else pyro.plate("data", rows)

        def model(x: Tensor) -> None:
            with plate(len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.expand(len(x), 2), 0.5).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            slope = pyro.param("slope", lambda: torch.zeros(2))
            with plate(len(x)):
                pyro.sample("z", dist.Normal((x @ slope)[:, None], 0.5).to_event(1))

        result = train(model, guide, x, num_epochs=3, batch_size=25, kl_warmup=2, validation=x[:40], **quick)
        return result, pyro.param("slope").detach()

    (scaled, slope), (whole, expected) = run(True), run(False)
    torch.testing.assert_close(slope, expected)
    for name, values in whole.history.items():
        assert scaled.history[name] == pytest.approx(values, rel=1e-4)


def test_indexed_data_reaches_the_model_in_order() -> None:
    x = data()
    seen: list[Tensor] = []

    def fetch(indices: Tensor) -> tuple[Tensor, ...]:
        seen.append(indices)
        return (x[indices],)

    first, second = pair(), pair()
    train(*first, IndexedData(60, fetch), num_epochs=2, batch_size=25, **quick)
    train(*second, x, num_epochs=2, batch_size=25, **quick)
    epoch = torch.cat(seen[-3:])
    assert [len(indices) for indices in seen[-3:]] == [25, 25, 10]
    assert sorted(epoch.tolist()) == list(range(60)) and epoch.tolist() != list(range(60))
    assert torch.equal(first[1].encoder[0].weight, second[1].encoder[0].weight)


# --- Validation, divergence and the caller's state --------------------------------------------------------------


def test_early_stopping_restores_the_best_weights() -> None:
    model, guide = pair((30,))
    x = data(20)
    result = train(model, guide, x[:10], num_epochs=400, batch_size=10, validation=x[10:], patience=15,
                   kl_warmup=5, progress=False, learning_rate=3e-2)  # fmt: skip
    values = result.history["validation_elbo"]
    assert result.stopped_early and result.num_epochs == result.best_epoch + 15
    assert result.best_epoch > 5 and values[result.best_epoch - 1] == max(values[5:]) == result.validation_elbo
    again = train(model, guide, x[:10], num_epochs=1, batch_size=10, validation=x[10:], progress=False,
                  schedule=lambda epoch: 0.0)  # fmt: skip
    assert again.validation_elbo == pytest.approx(result.validation_elbo, abs=1e-5)


def test_validation_does_not_disturb_training() -> None:
    class Dropping(AmortizedNormal):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(nn.functional.dropout(x, 0.5, self.training))

    def run(validation: Tensor | None) -> Tensor:
        torch.manual_seed(4)
        model, guide = LinearGaussian.random(4, 2), Dropping(4, 2, ())
        guide.train(False)
        result = train(model, guide, data(), num_epochs=5, batch_size=20, validation=validation, **quick)
        assert not guide.training
        assert result.best_epoch == 5
        return guide.encoder[0].weight.detach()

    assert torch.equal(run(None), run(data(200)))


def test_patience_needs_validation_data() -> None:
    with pytest.raises(InputError, match="patience needs validation"):
        train(*pair(), data(), patience=3, **quick)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_divergence_is_named_and_undone(kind: str) -> None:
    model, guide = pair()
    snapshot: list[Tensor] = []

    def sabotage(epoch: int) -> float:
        if epoch == 3:
            snapshot.extend(value.detach().clone() for value in (*model.parameters(), *guide.parameters()))
            if kind == "gradient":
                guide.encoder[0].weight.register_hook(lambda gradient: gradient * math.inf)
        return 1e30 if epoch == 3 and kind == "loss" else 1.0

    with pytest.raises(FloatingPointError, match=r"epoch 4: .* at step [12]\. Lower learning_rate.*those of epoch 3"):
        train(model, guide, data(), num_epochs=9, batch_size=20, schedule=sabotage, **quick)
    now = (*model.parameters(), *guide.parameters())
    assert all(torch.equal(old, new) for old, new in zip(snapshot, now, strict=True))
    assert all(value.grad is None for value in now)


def test_nan_in_the_data_is_never_silent() -> None:
    x = data()
    x[37, 2] = math.nan
    model, guide = pair()
    with pyro.validation_enabled(False), pytest.raises(InputError, match="data: argument 0 contains NaN") as refusal:
        train(model, guide, x, num_epochs=2, batch_size=20, **quick)
    assert isinstance(refusal.value.__cause__, FloatingPointError) and "the initial ones" in str(
        refusal.value.__cause__
    )


def test_the_callers_state_is_put_back() -> None:
    model, guide = pair()
    guide.encoder.train(False)
    state = torch.get_rng_state()
    for validating in (True, False):
        with pyro.validation_enabled(validating):
            train(model, guide, data(), num_epochs=1, **quick)
            assert pyro.infer.util.is_validation_enabled() is validating
    assert torch.equal(torch.get_rng_state(), state)
    assert guide.training and not guide.encoder.training


def test_the_seed_decides_everything() -> None:
    def run(seed: int) -> Tensor:
        model, guide = pair()
        train(model, guide, data(), num_epochs=2, batch_size=20, seed=seed, **quick)
        return guide.encoder[0].weight.detach()

    first = run(1)
    torch.randn(100)
    assert torch.equal(first, run(1)) and not torch.equal(first, run(2))


def test_the_bar_shows_epoch_and_bound(capsys: pytest.CaptureFixture[str]) -> None:
    train(*pair(), data(), num_epochs=3)
    shown = capsys.readouterr().err
    assert "epoch 3/3" in shown and "ELBO" in shown and "<" in shown


def test_gradients_of_the_caller_neither_enter_nor_stay() -> None:
    def run(stale: float) -> Tensor:
        model, guide = pair()
        for value in (*model.parameters(), *guide.parameters()):
            value.grad = torch.full_like(value, stale)
        train(model, guide, data(), num_epochs=1, freeze_model=True, **quick)
        assert all(value.grad is None for value in (*model.parameters(), *guide.parameters()))
        return guide.encoder[0].weight.detach()

    assert torch.equal(run(0.0), run(1e6))
