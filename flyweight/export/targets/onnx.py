"""One ONNX file: opset 17, batch size free, for ONNX Runtime, OpenVINO and whatever else reads it."""

from flyweight.export import int8
from flyweight.export.task import Task
from flyweight.exported import Exported

NAME = "onnx"
ENGINE = "onnxruntime"
INT8 = True
QUICK = True
NEEDS = ("onnxruntime",)
EXTRA = "onnx"


def export(task: Task) -> Exported:
    """See `targets`."""
    model, how = task.onnx[0], task.int8
    if how is not None:
        model = int8.shortened(int8.placed(model, how.ranges, how.scheme, how.kept))
    return task.exported(NAME, {".onnx": model.SerializeToString()})
