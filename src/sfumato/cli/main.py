"""The program `sfumato`: its commands, and what happens when something goes wrong.

Exit codes: 0 done, 1 a bug in sfumato, 2 the user can fix it, 3 training diverged or a model's
output is not finite, 74 the last checkpoint could not be written, 75 nothing moved any more, 76 another process of the
run has ended; 129,
130 and 143 interrupted with a checkpoint or finished images saved.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import sys
import traceback
from typing import Annotated

import typer

from sfumato import __version__
from sfumato.cli.compare import compare
from sfumato.cli.config import config_app, recipes
from sfumato.cli.convert_checkpoint import convert_checkpoint
from sfumato.cli.data import data_app
from sfumato.cli.doctor import doctor
from sfumato.cli.ema import ema
from sfumato.cli.evaluate import evaluate
from sfumato.cli.explain import explain
from sfumato.cli.export import export
from sfumato.cli.finetune import finetune
from sfumato.cli.metavars import explain_values
from sfumato.cli.report import report
from sfumato.cli.sample import sample
from sfumato.cli.slurm import slurm
from sfumato.cli.sweep import sweep
from sfumato.cli.system_errors import in_words
from sfumato.cli.train import resume, train
from sfumato.distributed import launch
from sfumato.errors import PeerError, SfumatoError
from sfumato.process.signals import ignore_save_requests
from sfumato.process.streams import be_patient

UNKNOWN = "\n  hint: run again with --debug and report it"

app = typer.Typer(
    name="sfumato",
    help="From a folder of images to a diffusion model that can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (
    train, resume, finetune, sample, export, compare, evaluate, sweep, report, ema, explain, recipes, doctor,
    convert_checkpoint, slurm,
):  # fmt: skip
    app.command(verb.__name__.replace("_", "-"))(verb)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show a traceback for every error; accepted at any position."),
    ] = False,
    allow_hub: Annotated[
        bool,
        typer.Option(
            "--allow-hub",
            help="Let a run that was made elsewhere fetch the models that it names from the hub; "
            "accepted at any position.",
        ),
    ] = False,
) -> None:
    """From a folder of images to a diffusion model that can be trusted."""


def main() -> None:
    """Run the program; one of several processes then ends at once."""
    try:
        run()
    except SystemExit as end:
        if "RANK" not in os.environ:
            raise
        # threads of a process group may abort an interpreter that ends in its own time
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def run() -> None:
    """Run the program; an error that a user can fix is one message, without a traceback."""
    # OpenMP's threads wait for one another by spinning; where another program wants the cores too,
    # long spins slow every step
    # several times over. This many turns cost nothing on an idle machine. Read once, when torch is
    # loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_memory()
    exit_quickly()
    launch.mute_others()
    be_patient()
    ignore_save_requests()
    debug = "--debug" in sys.argv
    if "--allow-hub" in sys.argv:
        os.environ["SFUMATO_ALLOW_HUB"] = "1"
    sys.argv = [argument for argument in sys.argv if argument not in ("--debug", "--allow-hub")]
    try:
        explain_values(typer.main.get_command(app))()
    except PeerError as error:  # that process says why
        if debug:
            raise
        if not launch.is_forked():
            _complain(f"error: {error}")
        sys.exit(error.exit_code)
    except SfumatoError as error:
        if debug:
            raise
        _complain(f"error: {error}")
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        code = getattr(error, "exit_code", None)  # an interrupted run has said what there is to say
        if code is None:
            known = in_words(error)
            code = 1 if known is None else known.exit_code
            if known is None and launch.is_forked():
                traceback.print_exc()
            _complain(f"error: {known or f'{type(error).__name__}: {error}{UNKNOWN}'}")
        sys.exit(code)


def keep_memory() -> None:
    """Make glibc keep freed memory for the next step.

    By default it returns every large buffer to the system, and pays page faults to get it again.
    """
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD in malloc.h
    max_maps, trim_threshold, top_pad = -4, -1, -2
    # macOS, musl and Windows have no mallopt, or need none
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((max_maps, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
            mallopt(option, value)


def exit_quickly() -> None:
    """Spare the interpreter the final garbage collection of all modules: 1.5 seconds with torch."""
    atexit.register(gc.freeze)


def _complain(message: str) -> None:
    from sfumato.observability.progress import printable

    typer.secho(printable(message), err=True, fg=typer.colors.RED)


if __name__ == "__main__":
    main()
