"""The one exception for input that cannot be used as it is."""


class InputError(ValueError):
    """Bad input, said in one line that names the site, argument or file and the remedy.

    The command turns it into exit code 2 and that line; a Python user catches it as a `ValueError`.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> try: pg.elbo(model, guide, x * float("nan"))
        ... except pg.InputError as error: print(str(error).split(".")[0])
        data: argument 0 contains NaN or infinite values
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def counted(number: int, what: str) -> str:
    """A number of things in words: 1 datapoint, 2 datapoints."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def reason_of(diverged: FloatingPointError) -> str:
    """Why training diverged: the first sentence of its error. The remedy is the caller's, who knows the setting."""
    return str(diverged).removeprefix("training: ").split(". ")[0]
