"""OpenVINO's own form, `.xml` and `.bin`, made from the ONNX file."""

import tempfile
from pathlib import Path

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

    model = openvino.Core().read_model(onnx.export(task).data)
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(model, f"{folder}/model.xml", compress_to_fp16=False)
        files = {suffix: (Path(folder) / f"model{suffix}").read_bytes() for suffix in (".xml", ".bin")}
    return task.exported(NAME, files)
