"""A folder that classifies pictures in the browser, from any static server: the ONNX file, a page, the runtime."""

from dataclasses import replace
from importlib.resources import files

from flyweight.export import web
from flyweight.export.targets import onnx
from flyweight.export.task import Task
from flyweight.exported import Exported

NAME = "web"
ENGINE = "onnxruntime-web"
INT8 = True
QUICK = False
NEEDS = onnx.NEEDS
EXTRA = onnx.EXTRA
lack = web.lack


def export(task: Task) -> Exported:
    """See `targets`. Raises UsageError where onnxruntime-web's files are not found."""
    runtime = web.runtime()
    model = onnx.export(task)
    beside = {name: (files(web) / name).read_bytes() for name in web.PAGE}
    beside |= {name: (runtime / name).read_bytes() for name in web.RUNTIME}
    beside["index.html"] = beside["index.html"].replace(b"model.onnx", model.name.encode())
    return replace(model, target=NAME, files={**model.files, **beside})
