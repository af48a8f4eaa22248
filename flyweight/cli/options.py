"""What the verbs share: an option, what stands in texts, how a job ends that was interrupted."""

import json
import sys
from collections.abc import Iterable
from typing import Annotated, Any, NoReturn

import typer

from flyweight.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def fail(message: str, code: int) -> NoReturn:
    """Ends the program with a sentence and an exit code."""
    print(f"flyweight: {message}", file=sys.stderr)
    sys.exit(code)


def read_settings(texts: Iterable[str]) -> dict[str, Any]:
    """The settings in texts of the form name=value."""
    return {name: read_value(text) for name, text in map(name_and_text, texts)}


def name_and_text(text: str) -> tuple[str, str]:
    """Of name=text. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"give name=value, not {text!r}")
    return name, value


def read_value(text: str) -> Any:
    """JSON where the text is some (0.25, true, [1, 2]), else the word that it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_values(text: str) -> list[Any]:
    """The values between commas."""
    return [read_value(each) for each in text.split(",")]


def words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(each.strip() for each in text.split(",") if each.strip())


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The whole numbers above zero between commas. Raises UsageError."""
    found = words(text)
    if not all(each.isdigit() and int(each) > 0 for each in found):
        raise UsageError(f"{option} takes whole numbers with commas between them, not {text!r}")
    return tuple(map(int, found))
