"""Several processes that train one network: two real ones, over gloo, against one with the whole batch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GLOBAL_NORM = {"drop_rate": 0.0}
NO_NORM = {"norm": "none", "drop_rate": 0.0}


def worker(folder: str) -> None:
    """One of two processes: gradients of a step by each network, in float64, and both processes' statistics."""
    import torch
    from safetensors.torch import save_file

    from flyweight.train.distributed import current, joined

    torch.set_num_threads(1)
    with joined():
        group = current()
        assert (group.rank, group.size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        for name, args in (("norm", GLOBAL_NORM), ("none", NO_NORM)):
            save_file(one_step(args), Path(folder) / f"{name}-{group.size}-{group.rank}.safetensors")


def one_step(args: dict[str, Any]) -> dict[str, Any]:
    """The gradients that a step of the training loop makes, the weights and statistics after it, and its loss."""
    import torch

    from flyweight.create import create_model
    from flyweight.data import open_source
    from flyweight.data.dataset import Dataset
    from flyweight.preprocess import Preprocess
    from flyweight.train.distributed import current, synchronised
    from flyweight.train.loop import _step
    from flyweight.train.recipe import recipe_for
    from flyweight.train.state import State
    from flyweight.train.task import Clock, Training

    source, group = open_source("demo"), current()
    pixels = np.asarray(source.images)[:23]
    data = Dataset({28: pixels}, pixels, np.arange(23), source.labels[:23], source.classes, "train", ("",) * 23)
    torch.manual_seed(0)
    net = create_model("resnet8_cifar", num_classes=10, in_chans=1, width=0.5, size=28, **args).double().train()
    recipe = replace(recipe_for(28), batch_size=23, shift=0, flip=False)
    job = Training(net, data, data, Preprocess.of(pixels), recipe, Clock(epochs=1), sync_batchnorm=True)
    state = State(job, group)
    gradients: dict[str, Any] = {}
    keep = state.optimiser.step

    def step() -> None:
        gradients.update(
            {f"gradient.{name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        )
        keep()

    state.optimiser.step = step  # type: ignore[method-assign]
    with synchronised(net, group) if group.size > 1 else nullcontext():
        loss = _step(job, state, np.arange(23), progress=0.2)
    after = {f"after.{name}": t.detach().clone() for name, t in net.state_dict().items()}
    return {name: t.contiguous() for name, t in (gradients | after | {"loss": loss.reshape(1)}).items()}


def port() -> int:
    """A free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(count: int, words: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Processes with the environment that torchrun gives them."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port()), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("stepped")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_distributed as t; t.worker('.')"
    )
    for status, errors in ended(started(2, ["-c", code], folder)):
        assert status == 0, errors
    return folder


@pytest.mark.parametrize(("name", "args"), [("none", NO_NORM), ("norm", GLOBAL_NORM)])
def test_two_processes_make_the_step_of_one(stepped: Path, name: str, args: dict[str, Any]) -> None:
    """23 pictures, so that the shares differ; with norms their statistics are those of all pictures."""
    from safetensors.torch import load_file

    whole = one_step(args)
    shares = [load_file(stepped / f"{name}-2-{rank}.safetensors") for rank in range(2)]
    assert whole.keys() == shares[0].keys() == shares[1].keys()
    assert sum(key.startswith("gradient.") for key in whole) >= 10
    for key, expected in whole.items():
        found = [share[key].double().numpy() for share in shares]
        np.testing.assert_array_equal(found[0], found[1], err_msg=key)
        near = 1e-6 if key == "loss" else 1e-10  # the loss is counted in float32
        np.testing.assert_allclose(found[0], expected.double().numpy(), atol=near, rtol=near, err_msg=key)


TRAIN = ["-m", "flyweight", "train", "demo", "--model", "resnet8_cifar", "--width", "0.25", "--set", "plain=true"]
TRAIN += ["--set", "batch_size=250", "--seed", "3", "--sync-batchnorm", "--checkpoint-every", "0", "--out", "run"]


def test_a_killed_worker_ends_the_job_with_a_word_and_it_goes_on(tmp_path: Path) -> None:
    both = started(2, [*TRAIN, "--epochs", "1.5"], tmp_path)
    state = tmp_path / "run" / "state" / "training.safetensors"
    deadline = time.monotonic() + 150
    while not state.with_name("training.earlier.safetensors").exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in both), ended(both)
        time.sleep(0.01)
    both[1].send_signal(signal.SIGKILL)
    (first, told), (second, _) = ended(both)
    assert (first, second) == (1, -signal.SIGKILL)
    assert "another process of this training has ended" in told.splitlines()[-1]
    assert "--resume run" in told.splitlines()[-1]
    assert "Traceback" not in told
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port())]
    words = [sys.executable, *torchrun, "-m", "flyweight", "train", "--resume", "run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["processes"] == 2
    assert result["epochs"] == 1.5
    assert result["test"]["top1"] > 0.2  # chance is 0.1
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert any("the training goes on from step" in line.get("message", "") for line in lines)
    assert [line["kind"] for line in lines].count("job") == 1, "one process writes"
    epochs = [line["epoch"] for line in lines if line["kind"] == "epoch"]
    assert epochs == sorted(set(epochs))
    assert done.stdout.count("resnet8_cifar: ") == 1
