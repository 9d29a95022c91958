"""The command lines of `pyrogaps compare` and `pyrogaps report`: paths, and options with values."""

from pyrogaps.errors import InputError


def read_arguments(command: str, arguments: list[str], known: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Paths, and options by name; raises `InputError` for an option that is not `known`, or without a value."""
    paths: list[str] = []
    options: dict[str, str] = {}
    rest = iter(arguments)
    for token in rest:
        if not token.startswith("--"):
            paths.append(token)
            continue
        name, equals, value = token.removeprefix("--").partition("=")
        if name not in known:
            raise InputError(f"{command}: unknown option --{name}. Known are --{', --'.join(known)}")
        text = value if equals else next(rest, "")
        if not text.strip():
            raise InputError(f"--{name} needs a value")
        options[name] = text
    return paths, options
