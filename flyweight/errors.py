"""What can go wrong, and the exit code that says so. Every message is one sentence naming the thing and the remedy."""


class FlyweightError(Exception):
    """Any failure that a user can act on; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(FlyweightError):
    """The request itself is wrong: an unknown name, a malformed budget, a path that does not exist."""

    exit_code = 2


class BudgetNotMet(FlyweightError):
    """No candidate met the budget; the nearest one was still shipped."""

    exit_code = 3


class DataError(FlyweightError):
    """The data was refused: a damaged file, an empty class, a class that a split lacks."""

    exit_code = 4


class ParityError(FlyweightError):
    """The exported file does not answer as the trained network does."""

    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a job; the message says how to go on."""

    exit_code = 130
