"""A page that classifies pictures in the browser: its files lie beside this one; the runtime comes from npm."""

import os
from pathlib import Path

from flyweight.errors import UsageError

VARIABLE = "FLYWEIGHT_ORT_WEB"
PAGE = ("index.html", "app.js", "resize.js", "style.css", "icon.svg", "serve.py")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def runtime() -> Path:
    """The folder with onnxruntime-web's files: the one that is named, or an npm folder's from here upwards.

    Raises UsageError where there is none.
    """
    if named := os.environ.get(VARIABLE):
        if absent := _absent(Path(named)):
            raise UsageError(f"{VARIABLE} names {named}, where {absent} is not: name onnxruntime-web's dist folder")
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if not _absent(found := folder / "node_modules" / "onnxruntime-web" / "dist"):
            return found
    raise UsageError(
        "onnxruntime-web is not here: npm install onnxruntime-web, in this folder, "
        f"or name its dist folder in {VARIABLE}"
    )


def lack() -> str | None:
    """Why there is no runtime, or None where there is one."""
    try:
        runtime()
    except UsageError as error:
        return str(error)
    return None


def _absent(dist: Path) -> str | None:
    return next((name for name in RUNTIME if not (dist / name).is_file()), None)
