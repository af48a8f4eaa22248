"""What is wrong with a file that cannot be read."""

from flyweight.errors import FlyweightError


class DamagedError(FlyweightError):
    """A packed file that cannot be decoded; its message says what the file does wrong, after the file's name."""
