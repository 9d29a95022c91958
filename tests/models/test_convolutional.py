"""Convolutional features and decoders, the VAE of images, and guides that read the features."""

from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from pyrogaps import AIS, GuideDensity, InputError, JointDensity, Refinement, decompose, train
from pyrogaps.cli.building import build_data, build_programs
from pyrogaps.guides.amortized import AmortizedMultivariateNormal, AmortizedNormal
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow
from pyrogaps.guides.flows import AmortizedFlow
from pyrogaps.likelihoods.discretised_logistic import DiscretisedLogistic
from pyrogaps.models.convolutional import ConvolutionalDecoder, ConvolutionalFeatures, ConvolutionalVAE
from tests.commands import parsed

SMALL: dict[str, Any] = {"image_shape": (2, 8, 8), "channels": (3, 4), "kernel_size": 3}
GUIDES = [AmortizedNormal, AmortizedMultivariateNormal, AmortizedFlow, AmortizedAuxiliaryFlow]


def images(number: int, levels: int = 2) -> Tensor:
    """Smooth images `(number, 2, 8, 8)` of as many grey levels, bright on the side that two factors choose."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(number, 2, 1, 1, generator=generator) * 2 - 1
    slope = torch.linspace(-1, 1, 8)
    values = (0.5 + 0.5 * factors * (slope[:, None] + slope)).clamp(0, 1)
    return (values * (levels - 1)).round() / (levels - 1)


def small_vae(likelihood: Any = "bernoulli") -> ConvolutionalVAE:
    torch.manual_seed(0)
    return ConvolutionalVAE(latent_dim=2, likelihood=likelihood, **SMALL)


def small_guide(kind: Any = AmortizedNormal) -> Any:
    return kind(128, 2, [], features=ConvolutionalFeatures(**SMALL))


def x_site(model: ConvolutionalVAE, x: Tensor, z: Tensor) -> Any:
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], Normal(0, 1).log_prob(z).sum(-1))
    assert [frame.name for frame in trace.nodes["x"]["cond_indep_stack"]] == ["data"]
    return trace.nodes["x"]


def test_the_defaults_are_the_papers() -> None:
    features, decoder = ConvolutionalFeatures(), ConvolutionalDecoder()
    assert features.num_features == 256 * 2 * 2
    kinds = [type(layer).__name__ for layer in decoder.layers]
    assert kinds == ["ConvTranspose2d", "BatchNorm2d", "ELU"] * 2 + ["ConvTranspose2d"]
    shapes = [tuple(layer.weight.shape) for layer in features.layers if isinstance(layer, nn.Conv2d)]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4)]
    mirror = [tuple(layer.weight.shape) for layer in decoder.layers if isinstance(layer, nn.ConvTranspose2d)]
    assert mirror == shapes[::-1]
    assert features(torch.zeros(2, 3, 32, 32)).shape == (2, 1024)
    assert decoder(torch.zeros(2, 50)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("settings", [(4, 2, 0), (4, 2, 1), (3, 1, 1), (5, 3, 2), (2, 3, 0), (1, 1, 0)])
@pytest.mark.parametrize("size", [(28, 28), (31, 26)])
def test_the_decoder_gives_back_the_size_that_was_taken(size: tuple[int, int], settings: tuple[int, int, int]) -> None:
    shape = (1, *size)
    features, decoder = (
        ConvolutionalFeatures(shape, [2, 3], *settings),
        ConvolutionalDecoder(4, shape, [2, 3], *settings),
    )
    assert features(torch.zeros(2, *shape)).shape == (2, features.num_features)
    assert decoder(torch.zeros(5, 2, 4)).shape == (5, 2, *shape)


def test_bernoulli_log_likelihood() -> None:
    model, x, z = small_vae().eval(), images(5), torch.randn(5, 2)
    expected = Bernoulli(logits=model.decoder(z)).log_prob(x).sum((1, 2, 3))
    site = x_site(model, x, z)
    torch.testing.assert_close(site["log_prob"], expected)
    assert site["fn"].event_shape == (2, 8, 8)
    torch.testing.assert_close(x_site(model, x.flatten(1), z)["log_prob"], expected)


def test_discretised_logistic_log_likelihood() -> None:
    model, x, z = small_vae("discretised_logistic").eval(), images(5, 256), torch.randn(5, 2)
    with torch.no_grad():
        model.log_noise_scale.copy_(torch.tensor([0.05, 0.2]).log().reshape(2, 1, 1))
    scale = torch.tensor([0.05, 0.2]).reshape(2, 1, 1)
    expected = DiscretisedLogistic(0.5 + model.decoder(z), scale).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(x_site(model, x, z)["log_prob"], expected)
    torch.testing.assert_close(x_site(model, x.flatten(1), z)["log_prob"], expected)


def test_each_channel_learns_its_own_scale() -> None:
    model = small_vae("discretised_logistic")
    x_site(model, images(5, 256), torch.randn(5, 2))["log_prob_sum"].backward()
    assert model.log_noise_scale.grad.shape == (2, 1, 1) and (model.log_noise_scale.grad != 0).all()
    assert not hasattr(small_vae(), "log_noise_scale")


def test_double_precision_and_byte_images() -> None:
    site = x_site(small_vae().double(), images(3).to(torch.uint8), torch.randn(3, 2).double())
    assert site["log_prob"].dtype == torch.float64
    guide = small_guide().double()
    assert guide.parameters_of(images(3).to(torch.uint8))[0].dtype == torch.float64


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("likelihood", ["bernoulli", "discretised_logistic"])
def test_rows_are_scored_by_themselves(kind: Any, likelihood: str) -> None:
    # Left in training mode, with statistics that are not those of any batch: the library evaluates.
    model, guide = small_vae(likelihood).double(), small_guide(kind).double()
    x = images(6, 2 if likelihood == "bernoulli" else 256).double()
    model(x), guide(x)
    if kind is AmortizedAuxiliaryFlow:
        model = guide.augment(model)
    joint = JointDensity(model, x)
    density = GuideDensity(guide, x, joint)
    z = torch.randn(3, 6, joint.dim).double()
    rows = [x[n : n + 1] for n in range(6)]
    alone = torch.cat([JointDensity(model, row)(z[:, n : n + 1]) for n, row in enumerate(rows)], 1)
    torch.testing.assert_close(joint(z), alone)
    alone = torch.cat([GuideDensity(guide, row, model).log_prob(z[:, n : n + 1]) for n, row in enumerate(rows)], 1)
    torch.testing.assert_close(density.log_prob(z), alone)


@pytest.mark.parametrize("kind", GUIDES)
def test_guides_read_the_features(kind: Any) -> None:
    guide, x = small_guide(kind), images(4)
    assert guide(x).shape == (4, 2)
    assert guide.encoder[0].in_features == guide.features.num_features
    before = guide.encode(x)
    with torch.no_grad():
        guide.features.layers[-2].bias += 1
    assert (guide.encode(x) - before).abs().min() > 0
    deep = kind(128, 2, [7], features=ConvolutionalFeatures(**SMALL))
    assert next(layer.out_features for layer in deep.encoder if isinstance(layer, nn.Linear)) == 7


def test_features_can_be_any_module_that_counts_them() -> None:
    class Mean(nn.Module):
        num_features = 2

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((-2, -1))

    assert AmortizedNormal(128, 3, features=Mean())(images(4)).shape == (4, 3)
    with pytest.raises(InputError, match="AmortizedNormal: features Flatten has no integer attribute num_features"):
        AmortizedNormal(128, 3, features=nn.Flatten())


def test_arguments_by_position_mean_what_they_did() -> None:
    assert next(name for name, _ in AmortizedNormal(784, 50, (200, 200)).named_parameters()) == "encoder.0.weight"
    assert AmortizedFlow(6, 4, [5], "Tanh", 1e-3, 3, 7).flow_hidden == 7


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"likelihood": "gaussian"}, "ConvolutionalVAE: likelihood must be one of"),
        ({"noise_scale": 0.0}, "ConvolutionalVAE: noise_scale"),
        ({"activation": "Elu"}, "activation"),
        ({"image_shape": (32, 32)}, "image_shape must be"),
        ({"channels": ()}, "channels must be"),
        ({"channels": (4, 0)}, "channels must be"),
        (
            {"channels": (4, 4, 4, 4)},
            r"4 layers are too many for 32 x 32 pixels; the input of layer 4 is only 2 x 2, but kernel_size is 4",
        ),
        ({"stride": 0}, "stride must be"),
        ({"padding": -1}, "padding"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        ConvolutionalVAE(**arguments)


def test_wrong_size_of_data() -> None:
    with pytest.raises(InputError, match="ConvolutionalVAE: data_dim is 128, but a datapoint has 64"):
        small_vae()(torch.zeros(2, 8, 8))
    with pytest.raises(InputError, match=r"image_shape is \[2, 8, 8\] \(128 elements\), but a datapoint has 64"):
        ConvolutionalFeatures(**SMALL)(torch.zeros(2, 8, 8))


@pytest.mark.parametrize(
    ("likelihood", "kind"), [("bernoulli", AmortizedNormal), ("discretised_logistic", AmortizedFlow)]
)
@pytest.mark.usefixtures("brief_check")
def test_a_small_pair_trains_and_its_gap_comes_apart(likelihood: str, kind: Any, recwarn: Any) -> None:
    model, guide = small_vae(likelihood), small_guide(kind)
    x = images(60, 2 if likelihood == "bernoulli" else 256)
    result = train(model, guide, x, num_epochs=15, batch_size=20, learning_rate=1e-2, validation=x[:20], progress=False)
    assert result.train_elbo > result.history["train_elbo"][0] + 10
    ledger = decompose(
        model, guide, x[:4], evidence=AIS(num_chains=4, num_temperatures=5, num_leapfrog=2),
        refinement=Refinement(num_steps=20), num_particles=50, progress=False,
    )  # fmt: skip
    values = ledger.per_datapoint
    assert values["inference_gap"].notnull().all()
    together = values["approximation_gap"] + values["amortization_gap"]
    torch.testing.assert_close(torch.tensor(together.values), torch.tensor(values["inference_gap"].values))
    assert not [w for w in recwarn if "eagerly" in str(w.message)]


def test_recipes_build_their_nested_parts(tmp_path: Any) -> None:
    grey = np.random.RandomState(0).randint(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", train_images=grey[:8], test_images=grey[8:])
    channels = ["--evaluate.num_datapoints", "3", "--model.init_args.channels", "[2, 2, 2]"]
    channels += ["--guide.init_args.features.init_args.channels", "[2, 3, 4]"]
    for name, likelihood in (("cifar-subset", "bernoulli"), ("cifar-8bit", "discretised_logistic")):
        recipe, _ = parsed([name, *channels, "--data.class_path", "pyrogaps.datasets.NPZ"])
        recipe.data.init_args.update(
            path=str(tmp_path / "tiny.npz"), train_key="train_images", test_key="test_images", channels_last=True,
            num_validation=2,
        )  # fmt: skip
        model, guide = build_programs(recipe)
        assert isinstance(guide.features, ConvolutionalFeatures) and guide.features.num_features == 16
        assert guide.encoder[0].in_features == 16 and model.likelihood == likelihood
        data, _ = build_data(recipe)
        assert JointDensity(model, data.evaluated)(torch.zeros(1, 3, 50)).shape == (1, 3)
        assert yaml.safe_load(recipe.to_yaml())["guide"]["init_args"]["features"]["init_args"]["channels"] == [2, 3, 4]


def test_the_column_of_flows_swaps_guide_and_further_family() -> None:
    recipe, _ = parsed(["cifar-flow"])
    assert recipe.guide.class_path.endswith("AmortizedAuxiliaryFlow") and list(recipe.families) == ["mean-field"]
    assert list(parsed(["cifar-ffg"])[0].families) == ["flow"]
