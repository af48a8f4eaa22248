"""LiteRT (TensorFlow Lite) on the CPU with XNNPACK; another number of pictures than before costs a new allocation."""

from collections.abc import Callable

import numpy as np

from flyweight.exported import Exported

NAME = "litert"
TARGET = "litert"
OPENS = {".tflite": ()}
NEEDS = ("ai_edge_litert",)
EXTRA = "litert"


def start(exported: Exported, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """See `engines`."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=exported.data, num_threads=threads)
    interpreter.allocate_tensors()
    image, answer = (each[0] for each in (interpreter.get_input_details(), interpreter.get_output_details()))
    batch = 1

    def run(images: np.ndarray) -> np.ndarray:
        nonlocal batch
        if len(images) != batch:
            interpreter.resize_tensor_input(image["index"], images.shape)
            interpreter.allocate_tensors()
            batch = len(images)
        interpreter.set_tensor(image["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(answer["index"])

    return run
