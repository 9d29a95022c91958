"""The command `python -m pyrogaps.eval [RECIPE] [options]`: from a recipe to its ledger of gaps."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import torch
import xarray as xr
from matplotlib.figure import Figure

from pyrogaps import ranks
from pyrogaps.building import (
    DataSet,
    build_data,
    build_encoder,
    build_evidence,
    build_families,
    build_programs,
    check_device,
    failures_named,
)
from pyrogaps.command_line import Options, help_text, parse
from pyrogaps.conditioning import Lookahead, declared, reference_guide
from pyrogaps.console import one_line_warnings, say
from pyrogaps.density.runs import Program, modules_of
from pyrogaps.errors import InputError
from pyrogaps.gaps import GapLedger, Split, decompose
from pyrogaps.mapa import Mapa, train_by_mapa
from pyrogaps.plots import plot_ledger
from pyrogaps.plots.ledger import page_size
from pyrogaps.recipe import Recipe
from pyrogaps.refine.families import Family
from pyrogaps.run_folder import MAPA, PARTS, REFERENCE, RESULTS, TRAINING, RunFolder
from pyrogaps.training import load_model_weights, load_weights, save_weights, train


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for input that cannot be used, 130 when interrupted, 1 when other
    processes that shared the work are gone.
    """
    try:
        with ranks.joined(), one_line_warnings():
            return _main(sys.argv[1:] if arguments is None else arguments)
    except ranks.LostRankError as error:
        print(f"pyrogaps: {error}; run the same command again to continue", file=sys.stderr, flush=True)
        return 1


def _main(arguments: list[str]) -> int:
    options = None
    try:
        parsed = parse(arguments)
        if parsed is None:
            print(help_text())
            return 0
        recipe, options = parsed
        if options.print_config:
            print(recipe.to_yaml(), end="")
            return 0
        _run(recipe, options)
    except InputError as error:
        say(f"pyrogaps: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        where = f"; run the same command again to continue from {options.out}" if options else ""
        say(f"\npyrogaps: interrupted{where}")
        return 130
    return 0


def _run(recipe: Recipe, options: Options) -> None:
    """Take `recipe` from wherever its folder stands to a finished ledger, and print it.

    Processes that share the work all come this way; only the first one writes, and says what is being done.
    """
    folder = RunFolder(options.out)
    device = ranks.together(lambda: _device(recipe))
    # Processes that torchrun starts again have the same arguments, and go on.
    overwrite = options.overwrite and not ranks.restarted()
    try:
        # What cannot be built leaves no folder behind, and what is finished needs no building.
        if ranks.first(lambda: overwrite or not (folder / "ledger.nc").exists()):
            built = ranks.together(lambda: _build(recipe, options, device))
            ranks.first(lambda: folder.claim(recipe.to_yaml(), overwrite=overwrite))
            ranks.together(lambda: _check_visible(folder))
            progress = not options.quiet
            ledger = ranks.together(lambda: _measured(recipe, *built, folder, progress=progress))
        else:
            ledger = ranks.first(lambda: _kept(recipe, folder))
        ranks.first(lambda: _report(ledger, folder))
    finally:
        folder.release()


def _device(recipe: Recipe) -> torch.device:
    """Where the run takes place."""
    if recipe.device == "cuda":
        ranks.take_gpu()
    return check_device(recipe.device)


def _build(
    recipe: Recipe, options: Options, device: torch.device
) -> tuple[Program, Program, DataSet, dict[str, Family]]:
    """The model, the guide, the data and the further families of a recipe, on their device."""
    for name in ("checkpoint", "model_checkpoint"):
        path = getattr(recipe, name)
        if path is not None and not Path(path).is_file():
            raise InputError(f"{name}: no file {path}")
    data, remarks = build_data(recipe, data_root=options.data_root, download=options.download)
    for remark in remarks:
        say(f"pyrogaps: {remark}")
    families = build_families(recipe)
    build_evidence(recipe)  # what cannot be built is refused before training
    pyro.clear_param_store()
    pyro.set_rng_seed(recipe.seed)
    model, guide = build_programs(recipe)
    for module in (*modules_of(model), *modules_of(guide)):
        module.to(device)
    return model, guide, data, families


def _check_visible(folder: RunFolder) -> None:
    """Processes on several machines go on from each other's files."""
    if not (folder / "recipe.yaml").exists():
        raise InputError(
            f"{folder.path}: rank {ranks.rank()} does not see what rank 0 wrote there; choose an --out on a file "
            "system that all machines share"
        )


def _measured(
    recipe: Recipe,
    model: Program,
    guide: Program,
    data: DataSet,
    families: dict[str, Family],
    folder: RunFolder,
    *,
    progress: bool,
) -> GapLedger:
    """The ledger of a recipe's pair, trained first where it has to be."""
    _weigh(recipe, model, guide, data, folder, progress=progress)
    reference = _reference(recipe, model, guide, data, folder, progress=progress)
    say("decomposing the inference gap")
    ledger = decompose(
        model,
        guide,
        data.evaluated,
        families=families,
        evidence=build_evidence(recipe),
        refinement=recipe.refinement,
        conditioning=recipe.conditioning,
        reference=reference,
        split=_split(recipe, data),
        certificate=recipe.certificate,
        num_particles=recipe.num_particles,
        plate=recipe.plate,
        batch_size=recipe.batch_size,
        max_memory=recipe.max_memory,
        compile=recipe.compile,
        seed=recipe.seed,
        progress=progress,
        cache=folder / PARTS,
    )
    # In memory first: a disk that is full would bring the library down in the midst of its writing.
    content = ledger.to_datatree().to_netcdf(engine="h5netcdf") if ranks.rank() == 0 else b""
    ranks.first(lambda: folder.write("ledger.nc", lambda path: path.write_bytes(content)))
    return ledger


def _kept(recipe: Recipe, folder: RunFolder) -> GapLedger:
    """The ledger of a run that is finished."""
    folder.claim(recipe.to_yaml(), overwrite=False)
    ledger = _read_ledger(folder / "ledger.nc")
    say(f"{folder.path} holds the finished run of this recipe (--overwrite computes it anew)")
    return ledger


def _weigh(recipe: Recipe, model: Program, guide: Program, data: DataSet, folder: RunFolder, *, progress: bool) -> None:
    """Give the model and guide their weights: those already in the folder, a checkpoint's, or freshly trained ones."""
    weights = folder / "checkpoint.pt"
    trained = ranks.first(weights.exists)
    source = weights if trained else Path(recipe.checkpoint) if recipe.checkpoint else None
    example = data.evaluated if data.train is None else data.train
    if source is not None:
        say(f"loading weights from {source}")
        found = source
        ranks.together(lambda: load_weights(found, model, guide, example))
    elif recipe.model_checkpoint is not None:
        say(f"loading the model's weights from {recipe.model_checkpoint}")
        from_run = recipe.model_checkpoint
        ranks.together(lambda: load_model_weights(from_run, model, guide, example))
    if source is None and recipe.mapa is not None:
        _train_by_mapa(recipe, recipe.mapa, model, guide, data, folder, progress=progress)
    if source is None and recipe.training is not None:
        say("training")
        assert data.train is not None
        with _divergence_named("training"):
            train(
                model,
                guide,
                data.train,
                **vars(recipe.training),
                validation=data.validation,
                checkpoint=folder / TRAINING,
                seed=recipe.seed,
                progress=progress,
            )
    if source != weights:
        ranks.first(lambda: folder.write("checkpoint.pt", lambda path: save_weights(path, model, guide)))


def _train_by_mapa(
    recipe: Recipe, mapa: Mapa, model: Program, guide: Program, data: DataSet, folder: RunFolder, *, progress: bool
) -> None:
    """Train the model by MAPA, with the recipe's encoder or else with the guide."""
    say("training the model by MAPA")
    assert data.train is not None
    encoder = build_encoder(recipe)
    for module in modules_of(encoder) if encoder is not None else ():
        module.to(recipe.device)
    with _divergence_named("mapa.training"):
        train_by_mapa(
            model,
            encoder,
            guide,
            data.train,
            mapa,
            plate=recipe.plate,
            checkpoint=folder / MAPA,
            seed=recipe.seed,
            progress=progress,
        )


def _reference(
    recipe: Recipe, model: Program, guide: Program, data: DataSet, folder: RunFolder, *, progress: bool
) -> Program | None:
    """The guide that the conditioning gap of a lookahead is measured by; None where none was asked for, or has a use.

    It learns from drawn data of the training data's shape: from those evaluated it would learn their lengths alone.
    """
    if recipe.reference is None:
        return None
    if not isinstance(declared(guide), Lookahead):
        say("pyrogaps: reference has no effect: the guide declares no lookahead short of all the future")
        return None
    say("training the reference guide on data drawn from the model")
    settings = {name: value for name, value in vars(recipe.reference).items() if name != "freeze_model"}
    with _divergence_named("reference"):
        return reference_guide(
            model,
            guide,
            data.evaluated if data.train is None else data.train,
            plate=recipe.plate,
            checkpoint=folder / REFERENCE,
            **settings,
            seed=recipe.seed,
            progress=progress,
        )


def _split(recipe: Recipe, data: DataSet) -> Split | None:
    """What splits the amortization gap; None where nothing does."""
    if recipe.retraining is None:
        return None
    assert data.train is not None
    return Split(data.train, recipe.retraining)


@contextmanager
def _divergence_named(section: str) -> Iterator[None]:
    """Say in one line that a training failed, and what to try."""
    try:
        yield
    except FloatingPointError as error:
        raise InputError(f"{section} diverged: {error}; try a smaller {section}.learning_rate") from error


def _read_ledger(path: Path) -> GapLedger:
    broken = f"{path}: reading the ledger (--overwrite computes it anew)"
    with failures_named(broken), xr.open_datatree(path, engine="h5netcdf") as tree:
        return GapLedger.from_datatree(tree.load())


def _report(ledger: GapLedger, folder: RunFolder) -> None:
    """Print the table; write what is made from the ledger where it is missing."""
    if not (folder / "summary.csv").exists():
        folder.write("summary.csv", lambda path: ledger.summary().to_csv(path))
    if not (folder / "gaps.png").exists():
        figure = Figure(figsize=page_size(ledger), layout="constrained")
        plot_ledger(ledger, figure)
        folder.write("gaps.png", lambda path: figure.savefig(path, dpi=150, format="png"))
    folder.finish()
    print(ledger)
    print("\nwritten:", *(f"  {folder / name}" for name in RESULTS), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
