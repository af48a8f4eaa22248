"""The command line: thin verbs over the library. Nothing heavy is imported before a verb needs it."""

import signal
import sys
from typing import Annotated

import typer

from flyweight import __version__
from flyweight.cli import files, jobs, networks, runtimes
from flyweight.cli.options import fail
from flyweight.errors import FlyweightError, Interrupted, UsageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From labelled pictures and a budget to the smallest, fastest image classifier that meets it.",
)

VERBS = [jobs.fit, jobs.predict, jobs.train, jobs.evaluate, networks.models, networks.cost, networks.tables]
VERBS += [networks.embed, jobs.sweep, jobs.report, jobs.compress, files.pack, files.unpack]
VERBS += [runtimes.export, runtimes.bench, runtimes.profile]
for verb in VERBS:
    app.command()(verb)

weights = typer.Typer(no_args_is_help=True, help="Take weights from other libraries, and give them back.")
app.add_typer(weights, name="weights")
weights.command("import")(files.import_weights)
weights.command("export")(files.export_weights)


def main() -> None:
    """Runs the command line; a failure is one sentence and its exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)  # the option parser turns an exit, and Ctrl-C, into a code of its own
    except (KeyboardInterrupt, typer.Abort):
        code = Interrupted.exit_code
    except FlyweightError as error:
        fail(str(error), error.exit_code)
    except MemoryError:
        fail("there is not enough memory: close other programs or use fewer or smaller pictures", 1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, which is not worth a word
        sys.exit(1)
    except Exception as error:
        message = getattr(error, "format_message", None)  # a usage error of the option parser's
        if message is None:
            raise
        if not message():
            sys.exit(UsageError.exit_code)  # the help has been printed
        fail(message(), UsageError.exit_code)
    if code == Interrupted.exit_code:
        fail("interrupted", code)
    sys.exit(code)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flyweight {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""
