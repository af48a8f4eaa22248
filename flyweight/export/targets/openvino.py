"""OpenVINO's own form, `.xml` and `.bin`, made from the ONNX file; in int8 its first layer takes pixels as they are."""

import tempfile
from pathlib import Path

import onnx as onnx_format

from flyweight.export.pixels import without_zero_point
from flyweight.export.targets import onnx
from flyweight.export.task import Task
from flyweight.exported import Exported

NAME = "openvino"
ENGINE = "openvino"
INT8 = True
QUICK = True
NEEDS = ("openvino",)
EXTRA = "openvino"


def export(task: Task) -> Exported:
    """See `targets`."""
    import openvino

    source = onnx.export(task).data
    if task.int8 is not None:
        source = without_zero_point(onnx_format.load_from_string(source)).SerializeToString()
    model = openvino.Core().read_model(source)
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(model, f"{folder}/model.xml", compress_to_fp16=False)
        files = {suffix: (Path(folder) / f"model{suffix}").read_bytes() for suffix in (".xml", ".bin")}
    return task.exported(NAME, files)
