"""The machine and the versions a measurement was made with."""

import importlib.metadata
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "onnxruntime", "onnx", "numpy", "pillow", "safetensors")
RUNTIMES = ("openvino", "ai-edge-litert", "ncnn", "executorch")  # where they are installed


def environment(threads: int) -> dict[str, Any]:
    """What a reader needs to judge the figures: processor, cores, memory, system, versions, thread count."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | _runtimes(),
        "threads": threads,
    }


def _runtimes() -> dict[str, str]:
    found = {}
    for name in RUNTIMES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
