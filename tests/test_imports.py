"""Who may import whom: a module imports only what stands to its left, and side roots import none of the chain."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flyweight"
CHAIN = [
    "ops", "graph", "channels", "initialise", "blocks", "net", "heads", "adapt", "zoo", "fold", "costs", "weights",
    "transfer", "foreign", "pretrained", "create", "timm_models", "tables", "train", "features", "export", "bench",
    "compress", "evaluation", "search", "profiling", "exporting", "benching", "stages", "racing", "shipping", "teacher",
    "fitting", "training", "compressing", "sweep", "cli",
]  # fmt: skip
# Roots that the chain may use and that use none of it.
ROOTS = {
    "affine", "errors", "units", "data", "report", "preprocess", "records", "job", "classifier", "run", "packed",
    "mistakes", "ship", "terminal", "exported",
}  # fmt: skip
# bench's engines and train's atomic writes are used by what a run leaves; torch-free modules use torch-free ones.
ALLOWED = {
    "affine": set(),
    "data": {"errors"},
    "report": {"errors", "units"},
    "units": set(),
    "errors": set(),
    "records": set(),
    "job": {"errors"},
    "preprocess": {"data", "errors"},
    "exported": {"errors", "preprocess"},
    "mistakes": {"data"},
    "classifier": {"bench", "data", "errors", "preprocess"},
    "run": {"classifier", "data", "errors", "packed"},
    "packed": {"affine", "bench", "classifier", "errors", "preprocess"},
    "ship": {"exported", "net", "preprocess", "timm_models", "train", "units", "weights"},
    "terminal": {"units", "bench", "costs", "fitting", "net", "profiling", "report", "run", "tables"},
}
TAKES_ANY_NET = ["graph", "fold", "export", "bench"]


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of flyweight that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flyweight":
            below = node.module.split(".")[1:]
            found |= {below[0]} if below else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("flyweight.")}
    return found - {"__version__", part(path)}


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if part(path) not in ("__init__", "__main__")]


def test_every_part_has_its_place() -> None:
    assert {part(path) for path in FILES} == set(CHAIN) | ROOTS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    own = part(path)
    allowed = set(CHAIN[: CHAIN.index(own)]) | ROOTS if own in CHAIN else ALLOWED[own]
    assert imported(path) <= allowed


@pytest.mark.parametrize("own", TAKES_ANY_NET)
def test_some_parts_take_any_net(own: str) -> None:
    for path in FILES:
        if part(path) == own:
            assert not imported(path) & {"zoo", "create"}
