"""The stages of one run of the command: build, train, measure, report."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
from matplotlib.figure import Figure

from pyrogaps import processes
from pyrogaps.cli.building import (
    DataSet,
    build_data,
    build_encoder,
    build_evidence,
    build_families,
    build_programs,
    check_device,
)
from pyrogaps.cli.console import say, shows_bars
from pyrogaps.cli.options import Options
from pyrogaps.cli.pictures import write_picture
from pyrogaps.cli.recipe import Recipe
from pyrogaps.cli.rehearsal import rehearse_run
from pyrogaps.cli.run_folder import (
    LEDGER,
    MAPA,
    PAGE,
    PARTS,
    PICTURE,
    REFERENCE,
    RESULTS,
    TABLE,
    TRAINING,
    WEIGHTS,
    RunFolder,
)
from pyrogaps.conditioning import Lookahead, declared, reference_guide
from pyrogaps.density import Data
from pyrogaps.density.runs import Program, modules_of
from pyrogaps.errors import InputError, reason_of
from pyrogaps.evidence import Evidence
from pyrogaps.gaps import GapLedger, Split, decompose
from pyrogaps.guard import failures_named
from pyrogaps.mapa import Mapa, train_by_mapa
from pyrogaps.plots import plot_ledger
from pyrogaps.plots.ledger import page_size
from pyrogaps.refine.families import Family
from pyrogaps.training import load_model_weights, load_weights, train
from pyrogaps.training.weights import dump, read_file, weights_alone
from pyrogaps.trees import content_of


class _Built(NamedTuple):
    """What a recipe names, built."""

    model: Program
    guide: Program
    data: DataSet
    families: dict[str, Family]
    evidence: Evidence


def run(recipe: Recipe, options: Options) -> None:
    """Take `recipe` from wherever its folder stands to a finished ledger, and print it.

    Processes that share the work all come this way; the folder lets the first one write, and the others read.
    """
    folder = RunFolder(options.out)
    # Processes that torchrun starts again have the same arguments, and go on.
    overwrite = options.overwrite and not processes.restarted()
    try:
        if overwrite or not folder.holds(LEDGER):
            # What cannot be built, on whichever process, leaves no folder behind.
            built = processes.together(lambda: _build(recipe, options))
            if overwrite or not folder.holds(WEIGHTS):
                rehearse_run(recipe, built.model, built.guide, built.data, _settings(recipe, built))
            folder.claim(recipe.to_yaml(), overwrite=overwrite)
            ledger = _measured(recipe, built, folder, progress=not options.quiet and shows_bars())
            data: Data | None = built.data.evaluated
        else:  # what is finished needs no building
            ledger, data = _kept(recipe, folder), None
            if not folder.is_intact(PAGE):
                data = _evaluated(recipe, options)
        _report(ledger, folder, data, options.command)
        if options.picture is not None:
            processes.first(partial(_draw, ledger, options.picture))
    finally:
        folder.release()


def _build(recipe: Recipe, options: Options) -> _Built:
    """What `recipe` names, on the device where the run takes place."""
    if recipe.device == "cuda":
        processes.take_gpu()
    check_device(recipe.device)
    for name in ("checkpoint", "model_checkpoint"):
        path = getattr(recipe, name)
        if path is None:
            continue
        if not Path(path).is_file():
            raise InputError(f"{name}: no file {path}. Name an earlier run's {WEIGHTS}")
        read_file(path)
    data, remarks = build_data(recipe, data_root=options.data_root, download=options.download)
    for remark in remarks:
        say(f"pyrogaps: {remark}")
    families, evidence = build_families(recipe), build_evidence(recipe)
    pyro.clear_param_store()
    pyro.set_rng_seed(recipe.seed % 2**32)  # NumPy takes no more
    model, guide = build_programs(recipe)
    return _Built(model, guide, data, families, evidence)


def _measured(recipe: Recipe, built: _Built, folder: RunFolder, *, progress: bool) -> GapLedger:
    """The ledger of a recipe's pair, trained first where it has to be."""
    _weigh(recipe, built, folder, progress=progress)
    reference = _reference(recipe, built, folder, progress=progress)
    say("decomposing the inference gap")
    ledger = decompose(
        built.model,
        built.guide,
        built.data.evaluated,
        **_settings(recipe, built),
        reference=reference,
        plate=recipe.plate,
        compile=recipe.compile,
        seed=recipe.seed,
        progress=progress,
        cache=folder / PARTS,
    )
    # In memory first: a disk that is full would bring the library down in the midst of its writing.
    content = content_of(ledger.to_datatree()) if processes.rank() == 0 else b""
    folder.write(LEDGER, lambda file: file.write(content))
    return ledger


def _settings(recipe: Recipe, built: _Built) -> dict[str, Any]:
    """What is measured, and how."""
    return {
        "families": built.families,
        "evidence": built.evidence,
        "refinement": recipe.refinement,
        "conditioning": recipe.conditioning,
        "split": _split(recipe, built.data),
        "certificate": recipe.certificate,
        "referee": recipe.referee,
        "shared": recipe.shared,
        "num_particles": recipe.num_particles,
        "batch_size": recipe.batch_size,
        "max_memory": recipe.max_memory,
    }


def _kept(recipe: Recipe, folder: RunFolder) -> GapLedger:
    """The ledger of a run that is finished."""
    folder.claim(recipe.to_yaml(), overwrite=False)
    ledger = processes.first(lambda: _read_ledger(folder / LEDGER))
    say(f"{folder.path} already contains the results of this recipe. Use --overwrite to compute them again")
    return ledger


def _weigh(recipe: Recipe, built: _Built, folder: RunFolder, *, progress: bool) -> None:
    """Give the model and guide their weights: those already in the folder, a checkpoint's, or freshly trained ones."""
    model, guide, data = built.model, built.guide, built.data
    weights = folder / WEIGHTS
    source = weights if folder.holds(WEIGHTS) else Path(recipe.checkpoint) if recipe.checkpoint else None
    if source is not None:
        say(f"loading weights from {source}")
        load_weights(source, model, guide, data.example)
    elif recipe.model_checkpoint is not None:
        say(f"loading the model's weights from {recipe.model_checkpoint}")
        load_model_weights(recipe.model_checkpoint, model, guide, data.example)
    if source is None and recipe.mapa is not None:
        _train_by_mapa(recipe, recipe.mapa, built, folder, progress=progress)
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
        folder.write(WEIGHTS, lambda file: dump(file, weights_alone(model, guide)))


def _train_by_mapa(recipe: Recipe, mapa: Mapa, built: _Built, folder: RunFolder, *, progress: bool) -> None:
    """Train the model by MAPA, with the recipe's encoder or else with the guide."""
    say("training the model by MAPA")
    assert built.data.train is not None
    encoder = build_encoder(recipe)
    for module in modules_of(encoder) if encoder is not None else ():
        module.to(recipe.device)
    with _divergence_named("mapa.training"):
        train_by_mapa(
            built.model,
            encoder,
            built.guide,
            built.data.train,
            mapa,
            plate=recipe.plate,
            checkpoint=folder / MAPA,
            seed=recipe.seed,
            progress=progress,
        )


def _reference(recipe: Recipe, built: _Built, folder: RunFolder, *, progress: bool) -> Program | None:
    """The guide by which the conditioning gap of a lookahead is measured; None where none was asked for or is of use.

    It learns from simulated data of the shape of the training data: from data of the shape of the evaluated ones it
    would learn their lengths alone.
    """
    if recipe.reference is None:
        return None
    if not isinstance(declared(built.guide), Lookahead):
        say("pyrogaps: reference has no effect, because the guide declares no finite lookahead")
        return None
    say("training the reference guide on data simulated from the model")
    settings = {name: value for name, value in vars(recipe.reference).items() if name != "freeze_model"}
    with _divergence_named("reference"):
        return reference_guide(
            built.model,
            built.guide,
            built.data.example,
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
        with failures_named(section):  # a schedule's
            yield
    except FloatingPointError as error:
        raise InputError(f"{section} diverged ({reason_of(error)}). Lower {section}.learning_rate") from error


def _read_ledger(path: Path) -> GapLedger:
    try:
        return GapLedger.load(path)
    except InputError as error:
        raise InputError(f"{error}. With --overwrite it is computed again") from error


def _draw(ledger: GapLedger, path: Path) -> None:
    """Write the picture where the user asked for it."""
    write_picture(path, lambda figure: plot_ledger(ledger, figure), page_size(ledger))
    print(f"  {path}")


def _evaluated(recipe: Recipe, options: Options) -> Data | None:
    """The data of a finished run, for the page to show; None, with a line on why, where they cannot be read."""
    try:
        return processes.together(lambda: build_data(recipe, data_root=options.data_root, download=False)[0].evaluated)
    except InputError as error:
        say(f"pyrogaps: {PAGE} takes its datapoints from the ledger alone: {error}")
        return None


def _page(ledger: GapLedger, data: Data | None, folder: RunFolder, command: str) -> bytes:
    """The page. Where the data cannot be shown, a line says why, and the page shows what the ledger holds of them."""
    from pyrogaps.report import page_of  # with Bokeh, which nothing else needs

    title = f"Inference gaps of {folder.path.resolve().name}"
    try:
        return page_of(ledger, data, command=command, title=title).encode()
    except InputError as error:
        say(f"pyrogaps: {PAGE} takes its datapoints from the ledger alone: {error}")
        return page_of(ledger, command=command, title=title).encode()


def _report(ledger: GapLedger, folder: RunFolder, data: Data | None, command: str) -> None:
    """Print the table; write what is made from the ledger where it is missing or not as it was written."""
    if not folder.is_intact(TABLE):
        folder.write(TABLE, lambda file: file.write(ledger.summary().to_csv().encode()))
    if not folder.is_intact(PICTURE):
        figure = Figure(figsize=page_size(ledger), layout="constrained")
        plot_ledger(ledger, figure)
        folder.write(PICTURE, lambda file: figure.savefig(file, dpi=150, format="png"))
    if not folder.is_intact(PAGE):
        folder.write(PAGE, lambda file: file.write(_page(ledger, data, folder, command)))
    folder.finish()
    if processes.rank() == 0:
        print(ledger)
        print("\nwritten:", *(f"  {folder / name}" for name in RESULTS), sep="\n")
