"""Models in plain PyTorch: pairs that have the ELBO of the model's own loss, and one line for wrong use."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import Normal

import pyrogaps as pg
from pyrogaps.density.runs import evaluating
from tests.adapters.styles import STYLES, Basic, D, H, L, Style, bits

FEW: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=4, num_selection=16),
    "evidence": pg.AIS(4, 4),
    "num_particles": 64,
    "referee": False,
    "progress": False,
}
BERNOULLI = {"likelihood": "bernoulli", "second": "log_variance"}


def as_args(data: Any) -> tuple[Any, ...]:
    return data if isinstance(data, tuple) else (data,)


def own_elbo(made: Style, *programs: Any) -> tuple[float, float]:
    """Minus the style's own loss, over the data, and its standard error."""
    with evaluating(made.loss, *programs), torch.no_grad():
        losses = torch.tensor([-float(made.loss(*as_args(made.data))) for _ in range(300)], dtype=torch.float64)
    return float(losses.mean()), float(losses.std()) / 300**0.5


@pytest.mark.parametrize("name", STYLES)
def test_the_elbo_is_the_models_own(name: str) -> None:
    """Within 4 standard errors, or the difference is explained in words."""
    made = STYLES[name]()
    model, guide = made.pair()
    bound = pg.elbo(model, guide, made.data, num_particles=1000)
    ours, error = float(bound.value.sum()), float(bound.mcse.square().sum().sqrt())
    theirs, their_error = own_elbo(made, model, guide)
    same = abs(ours - theirs) < 4 * math.hypot(error, their_error)
    assert math.hypot(error, their_error) < 0.02 * abs(theirs)
    assert same == (not made.reason), (ours, error, theirs, their_error)
    if made.reason:
        with pytest.warns(UserWarning, match=made.reason):
            model, guide = made.pair(data=made.data, elbo=made.loss)
        assert [line for line in pg.Problem.of(model, guide, made.data).remarks if "the loss given" in line]
    else:
        made.pair(data=made.data, elbo=made.loss)  # without a warning, which would be an error


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.usefixtures("brief_check")
def test_a_ledger_takes_five_lines(name: str) -> None:
    made = STYLES[name]()
    lines = inspect.getsource(made.pair).splitlines()
    assert len(lines) <= 5  # the definition included; the ledger is one more
    ledger = pg.decompose(*made.pair(), made.data, **FEW)
    assert torch.isfinite(torch.tensor(ledger.per_datapoint["inference_gap"].values)).all()


# Wrong use

ENCODER, DECODER = nn.Linear(D, 2 * L), nn.Linear(L, D)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {}


def halves(x: Tensor) -> tuple[Tensor, ...]:
    return ENCODER(x).chunk(2, -1)


def wrong(name: str, words: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def enter(call: Callable[[], Any]) -> Callable[[], Any]:
        WRONG[name] = call, words
        return call

    return enter


def refusal(
    name: str, words: str, encoder: Any = halves, decoder: Any = DECODER, data: Any = None, **more: Any
) -> None:
    """A wrong use by settings that replace those of a right one."""
    settings: dict[str, Any] = {**BERNOULLI, **more}
    x = data
    WRONG[name] = (lambda: pg.from_torch(encoder, decoder, data=bits() if x is None else x, **settings)), words


refusal(
    "a log-variance as scale",
    r"encoder: its second output has negative values \(from -.* to .*\), so it is no scale\. Pass second='log_v",
    second="scale",
)
refusal(
    "a scale as log-variance",
    r"encoder: its second output is positive throughout .* as scales are; as a log-variance .* Pass second='scale'",
    encoder=lambda x: (halves(x)[0], F.softplus(halves(x)[1])),
)
refusal(
    "a sigmoid under logits",
    r"decoder: every output lies in \[0, 1\], as after a sigmoid .* so they are no logits\. Pass output='prob",
    decoder=lambda z: torch.sigmoid(DECODER(z)),
)
refusal(
    "logits as probabilities",
    r"decoder: some outputs lie outside \[0, 1\] .* Pass output='logits'",
    output="probabilities",
)
refusal(
    "log-rates as rates",
    r"decoder: some outputs are negative .* so they are no rates\. Pass output='log_rate'",
    likelihood="poisson",
    output="rate",
)
refusal(
    "rates as log-rates",
    r"decoder: no output is negative, .* so they are no logarithms\. Pass output='rate'",
    decoder=lambda z: F.softplus(DECODER(z)),
    likelihood="poisson",
    output="log_rate",
)
refusal(
    "rates of an unknown kind",
    r"output: .*'poisson' needs it\. Pass output='rate' or output='log_rate'",
    likelihood="poisson",
)
refusal(
    "a wrong latent_dim", r"latent_dim: it is 3, but the encoder returns 2 latents\. Pass latent_dim=2", latent_dim=3
)
refusal(
    "a second that is not said", r"encoder: it returned a tuple of 2 .* Say what the second is: second=", second=None
)
refusal(
    "an encoder that returns one tensor",
    r"encoder: it returned a tensor of shape \(64, 4\)\. .* net\(x\)\.chunk\(2, -1\)",
    encoder=ENCODER,
)
refusal(
    "an encoder that returns three tensors",
    r"encoder: it returned a tuple of 3 \(a tensor of shape \(64, 9\), a tensor of shape \(64, 2\), .* net\(x\)\[1:3\]",
    encoder=Basic(),
)
refusal(
    "an encoder that returns a dictionary",
    r"encoder: it returned a dict with hidden, code\. Return \(mean, log-variance\)",
    encoder=lambda x: {"hidden": x, "code": x},
)
refusal(
    "two shapes",
    r"encoder: its mean has shape \(64, 2\) and its log-variance \(64, 1\)\. Return both in one shape",
    encoder=lambda x: (halves(x)[0], halves(x)[1][:, :1]),
)
refusal(
    "a name that says otherwise",
    r"second: it is 'scale', but the encoder returns .* whose name says 'log_variance'\. Leave second out",
    encoder=lambda x: dict(zip(("mu", "logvar"), halves(x), strict=True)),
    second="scale",
)
refusal("an encoder that fails", r"encoder failed: RuntimeError: .* \(64x9 and 5x4\)", encoder=nn.Linear(5, 4))
refusal("a decoder that fails", r"decoder failed: RuntimeError: .* \(64x2 and 3x9\)", decoder=nn.Linear(3, D))
refusal(
    "another size", r"decoder: its output has shape \(8,\) per datapoint, but x has \(9,\)\.", decoder=nn.Linear(L, 8)
)
refusal(
    "a likelihood that there is not", r"likelihood: must be one of bernoulli, .*, got 'gaussian'", likelihood="gaussian"
)
refusal("no likelihood", r"decoder: it returned a tensor .* name a likelihood: bernoulli, ", likelihood=None)
refusal("no scale", r"scale: the likelihood 'normal' needs one\. Pass a number \(1\.0 where", likelihood="normal")
refusal("a scale of bits", r"scale: this likelihood has none\. Leave it out", scale=1.0)
refusal("a scale by another name", r"scale: must be a number, .*, got 'std'", likelihood="normal", scale="std")
refusal(
    "a kind for means",
    r"output: it has no use .* got 'logits'\. Leave it out",
    likelihood="normal",
    scale=1.0,
    output="logits",
)
refusal("another kind", r"output: it is one of logits, probabilities .* got 'rate'\. Pass one of them", output="rate")
refusal(
    "a second that is not wanted",
    r"decoder: it returned a tuple of 2 .* Return one tensor, or say by scale= what the second is",
    decoder=lambda z: (DECODER(z), DECODER(z)),
    likelihood="normal",
    scale=1.0,
)
refusal(
    "a second of unknown kind",
    r"decoder: it returned a tuple of 2 .* Say what the second is: scale='log_variance'",
    decoder=lambda z: (DECODER(z), DECODER(z)),
    likelihood="normal",
)
refusal(
    "a second that is missing",
    r"decoder: it returned a tensor .* Return \(mean, log-variance\)",
    likelihood="normal",
    scale="log_variance",
)
refusal(
    "a negative scale",
    r"decoder: its second output has negative values .* so it is no scale\. Pass scale='log_scale'",
    decoder=lambda z: (DECODER(z), DECODER(z)),
    likelihood="normal",
    scale="scale",
)
refusal(
    "a negative dispersion",
    r"decoder: its second output has negative values .* so it is no dispersion\. Return its exp",
    decoder=lambda z: (DECODER(z), DECODER(z)),
    likelihood="negative-binomial",
    output="log_rate",
)
refusal(
    "a prior of other latents",
    r"prior: its draws have shape \(3,\), but the encoder's latents have \(2,\)",
    prior=Normal(torch.zeros(3), 1.0),
)
refusal(
    "a prior that is none",
    r"prior: it returned a tensor of shape \(2,\)\. Return a distribution",
    prior=lambda: torch.zeros(2),
)
refusal(
    "a distribution beside a likelihood",
    r"likelihood: it is 'bernoulli', but the decoder returns a Normal of .*\. Leave likelihood out",
    decoder=lambda z: Normal(DECODER(z), 1.0),
)
refusal("a condition of no name", r"conditions: must be different names .*, got \['a b'\]", conditions=("a b",))
refusal("a condition that is x", r"conditions: must be different names .*, got \['x'\]", conditions=("x",))
refusal("a class", r"encoder: Linear is a class\. Pass an instance of it, Linear\(\.\.\.\)", encoder=nn.Linear)
refusal("no forward", r"encoder: ModuleList has no forward\. Pass a method", encoder=nn.ModuleList([ENCODER]))
refusal(
    "labels that are not named",
    r"conditions: the data have 1 argument beside x, but 0 conditions are named",
    data=(bits(), bits()[:, 0]),
)
refusal(
    "labels that are missing",
    r"conditions: .* 0 arguments beside x, but 1 condition is named \(label\)",
    conditions=("label",),
)
refusal(
    "a likelihood that returns none",
    r"likelihood: it returned a tensor .* Return a distribution",
    likelihood=lambda output: output,
)
refusal(
    "a distribution of another size",
    r"likelihood: it is a Normal of batch shape \(64, 8\) .* for 64 datapoints of shape \(9,\)",
    decoder=nn.Linear(L, 8),
    likelihood=lambda output: Normal(output, 1.0),
)


@wrong(
    "data between zero and one",
    r"site 'x': .* such as 0\.5, .* Bernoulli .* Make them zeros and ones, .*='continuous-bernoulli'",
)
def grey() -> Any:
    return pg.elbo(*pg.from_torch(halves, DECODER, **BERNOULLI), bits() / 2)


@wrong(
    "normalised counts under poisson",
    r"site 'x': .* such as 0\.5, .* Poisson .* Pass whole counts, .*='normal'",
)
def normalised() -> Any:
    pair = pg.from_torch(halves, DECODER, likelihood="poisson", output="log_rate", second="log_variance")
    return pg.elbo(*pair, bits() / 2)


@wrong(
    "normalised counts under a negative binomial",
    r"site 'x': .* such as 0\.5, .* NegativeBinomial .* Pass whole counts",
)
def normalised_too() -> Any:
    decoder = lambda z: (DECODER(z), torch.ones(D))  # noqa: E731
    pair = pg.from_torch(halves, decoder, likelihood="negative-binomial", output="log_rate", second="log_variance")
    return pg.elbo(*pair, bits() / 2)


@wrong("classes beyond the last", r"site 'x': .* such as 9, .* Categorical .* Pass the numbers of classes")
def beyond() -> Any:
    decoder = lambda z: DECODER(z)[:, None]  # noqa: E731
    encoder = lambda x: halves(x.float().expand(-1, D))  # noqa: E731
    pair = pg.from_torch(encoder, decoder, likelihood="categorical", second="log_variance")
    return pg.elbo(*pair, torch.full((5, 1), 9))


@wrong("a loss without data", r"elbo: it is compared on some datapoints\. Pass data=")
def without_data() -> Any:
    return pg.from_torch(halves, DECODER, **BERNOULLI, elbo=lambda x: x.sum())


@wrong(
    "a loss of several numbers", r"elbo: for one datapoint it returned a tensor of shape \(1, 9\)\. Return one number"
)
def several() -> Any:
    return pg.from_torch(halves, DECODER, **BERNOULLI, elbo=lambda x: x, data=bits())


@wrong("a loss that fails", r"elbo failed: TypeError: .* takes 0 positional arguments")
def failing() -> Any:
    return pg.from_torch(halves, DECODER, **BERNOULLI, elbo=lambda: 0.0, data=bits())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line(name: str) -> None:
    call, words = WRONG[name]
    # Weights for which the second outputs have both signs, whatever ran before.
    with torch.no_grad():
        for module in (ENCODER, DECODER):
            module.bias.zero_()
    with pytest.raises(pg.InputError, match=words) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 420


def test_the_remedies_work() -> None:
    """Those of the messages above, each on the program that was refused."""
    x, sigmoid = bits(), nn.Sequential(DECODER, nn.Sigmoid())
    softplus = lambda x: (halves(x)[0], F.softplus(halves(x)[1]))  # noqa: E731
    as_distribution = lambda x: Normal(halves(x)[0], (F.softplus(halves(x)[1]) / 2).exp())  # noqa: E731
    for encoder, decoder, settings, data in (
        (halves, sigmoid, {**BERNOULLI, "output": "probabilities"}, x),
        (halves, sigmoid, {**BERNOULLI, "output": "logits"}, x),
        (softplus, DECODER, {**BERNOULLI, "second": "scale"}, x),
        (as_distribution, DECODER, {"likelihood": "bernoulli"}, x),
        (halves, DECODER, {**BERNOULLI, "likelihood": "continuous-bernoulli"}, x / 2),
        (halves, DECODER, {**BERNOULLI, "likelihood": "binary-cross-entropy"}, x / 2),
        (halves, DECODER, {"likelihood": "normal", "scale": "learned", "second": "log_variance"}, x / 2),
        (lambda x: (x, *halves(x))[1:3], DECODER, BERNOULLI, x),
    ):
        model, guide = pg.from_torch(encoder, decoder, **settings, data=data)
        assert torch.isfinite(pg.elbo(model, guide, data, num_particles=10).value).all()


# No false alarms


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_logits_and_log_variances_raise_no_alarm(scale: float) -> None:
    """Of untrained networks of few and of many outputs, with biases inside [0, 1] too."""
    for seed in range(40):
        torch.manual_seed(seed)
        number = 1 + seed % 3
        decoder = nn.Sequential(nn.Linear(L, H), nn.ReLU(), nn.Linear(H, number))
        encoder = nn.Sequential(nn.Linear(number, H), nn.Tanh(), nn.Linear(H, 2 * L))
        with torch.no_grad():
            decoder[-1].weight *= scale
            decoder[-1].bias.uniform_(0.1, 0.9)
        x = (torch.rand(20, number) < 0.5).float()
        pg.from_torch(lambda x, net=encoder: net(x).chunk(2, -1), decoder, **BERNOULLI, data=x)


def test_programs_that_refuse_far_values_raise_no_alarm() -> None:
    """Values far from the data are for judging alone."""

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        assert float(x.max()) <= 1
        return halves(x)

    def decode(z: Tensor) -> Normal:
        assert float(z.abs().max()) < 100
        return Normal(DECODER(z), DECODER(z).exp())

    model, guide = pg.from_torch(encode, decode, second="log_variance", data=bits())
    assert torch.isfinite(pg.elbo(model, guide, bits(), num_particles=10).value).all()


def test_sigmoids_and_softpluses_are_found() -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        number = 1 + seed % 3
        decoder, encoder = nn.Linear(L, number), nn.Linear(number, 2 * L)
        x = (torch.rand(20, number) < 0.5).float()
        with pytest.raises(pg.InputError, match="no logits"):
            pg.from_torch(
                lambda x, net=encoder: net(x).chunk(2, -1),
                lambda z, net=decoder: torch.sigmoid(net(z)).clamp(1e-4, 1 - 1e-4),
                **BERNOULLI,
                data=x,
            )
        with pytest.raises(pg.InputError, match="positive throughout"):
            pg.from_torch(
                lambda x, net=encoder: (net(x)[:, :L], F.softplus(net(x)[:, L:])), decoder, **BERNOULLI, data=x
            )


# What the pair works with


def test_training_mode_is_one_line_in_the_ledger() -> None:
    made = STYLES["convolutional with batch normalisation"]()
    model, guide = made.pair()
    assert model.training and guide.training
    bound = pg.elbo(model, guide, made.data).value
    remarks = pg.Problem.of(model, guide, made.data).remarks
    assert sum("dropout in the guide is off (evaluation mode)" in line for line in remarks) == 1
    assert sum("batch normalisation in the model" in line for line in remarks) == 1
    assert all(module.training for module in (*model.modules(), *guide.modules()))
    model.eval(), guide.eval()
    assert torch.equal(pg.elbo(model, guide, made.data).value, bound)


def test_the_networks_are_the_callers_own() -> None:
    """Training the pair trains them; the encoder's parameters are the guide's, those of the decoder the model's."""
    vae, x = Basic(), bits()
    model, guide = pg.from_torch(vae.encode, lambda z: vae.fc4(F.relu(vae.fc3(z))), **BERNOULLI)
    before = {name: value.clone() for name, value in vae.named_parameters()}
    pg.train(model, guide, x, num_epochs=1, freeze_model=True, progress=False)
    changed = {name for name, value in vae.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(("fc1", "fc2"))}
    pg.train(model, guide, x, num_epochs=1, progress=False)
    assert not any(torch.equal(value, before[name]) for name, value in vae.named_parameters())


@pytest.mark.usefixtures("brief_check")
@pytest.mark.parametrize("name", ["basic", "vampprior"])
def test_everything_takes_the_pair(name: str, tmp_path: Path) -> None:
    made = STYLES[name]()
    model, guide = made.pair()
    rounds = pg.Retraining(pg.Training(num_epochs=1), num_restarts=1, max_rounds=1)
    before = {name: value.clone() for name, value in guide.named_parameters()}
    options = {
        **FEW,
        "families": {"mean-field": AutoNormal},
        "split": pg.Split(made.data, rounds),
        "cache": tmp_path / "cache",
    }
    ledger = pg.decompose(model, guide, made.data, **options)
    assert all(torch.equal(value, before[name]) for name, value in guide.named_parameters())
    assert {"capacity_gap", "approximation_gap[mean-field]"} <= {*ledger.summary().index}
    again = pg.decompose(model, guide, made.data, **options)
    assert ledger.per_datapoint.equals(again.per_datapoint)
    ledger.save(tmp_path / "gaps.nc")
    loaded = pg.GapLedger.load(tmp_path / "gaps.nc")
    assert not pg.compare(loaded, again).differences["mean"].values.any()
    calibration = pg.calibrate(model, guide, made.data, num_simulated=20, num_draws=100)
    assert "20 datapoints simulated" in str(calibration)
    value = pg.log_evidence(model, guide, made.data, evidence=pg.AIS(4, 4))
    assert torch.isfinite(torch.as_tensor(value.value)).all()
