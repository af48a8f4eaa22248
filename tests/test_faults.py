"""What can happen to a training: kills, signals, a full disk, too little memory. Real processes, real limits.

Importing torch takes seconds, so one process imports it once and forks a child for each run: `Nursery`.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SPECS: dict[str, dict[str, Any]] = {
    "with norm": {"name": "resnet8_cifar", "drop_rate": 0.1, "width": 0.25},
    "without norm": {"name": "squeezenet1_1", "stem": "cifar", "norm": "none", "drop_rate": 0.0},
}


# ------------------------------------------------------------------------------------------------ in the children


def run_nursery() -> None:
    """Forks a child for each line on stdin, {"call", "args", "folder"}; tells its pid, then how it ended."""
    import torch

    import flyweight.cli
    import flyweight.training  # noqa: F401
    from flyweight.data import open_source, prepare

    torch.set_num_threads(1)
    splits = prepare(open_source("demo"), [28])
    with tempfile.TemporaryDirectory() as place:
        train_and_tell(Path(place), splits, epochs=1.2)  # kernels are made once, not by each child
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(asked, splits)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


def _child(asked: dict[str, Any], splits: Any) -> None:
    from flyweight.errors import FlyweightError

    folder = Path(asked["folder"])
    code = 0
    with (folder / "errors").open("a") as errors:
        os.dup2(errors.fileno(), 2)
        os.dup2(errors.fileno(), 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            globals()[asked["call"]](folder, splits, **asked["args"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        except FlyweightError as error:
            print(error, file=sys.stderr)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _job(
    folder: Path,
    splits: Any,
    net: str = "with norm",
    epochs: float = 1.0,
    seconds: float | None = None,
    images: int = 256,
    **changes: Any,
) -> Any:
    import torch

    from flyweight.create import create_model
    from flyweight.preprocess import Preprocess
    from flyweight.records import Records
    from flyweight.train.recipe import recipe_for
    from flyweight.train.task import Clock, Training

    torch.manual_seed(0)
    data = splits.train.subset(np.arange(images))
    begun = time.perf_counter()
    records = Records(folder, lambda: time.perf_counter() - begun)

    def emit(values: dict[str, Any]) -> None:
        records.write("epoch", **values)

    return Training(
        net=create_model(num_classes=10, in_chans=1, size=28, **SPECS[net]),
        data=data,
        validation=splits.validation.subset(np.arange(60)),
        preprocess=Preprocess.of(data.batch(28)),
        recipe=replace(recipe_for(28), **{"learning_rate": 0.05, "batch_size": 32} | changes),
        clock=Clock(seconds, None if seconds else epochs),
        emit=emit,
        note=records.say,
        records=records,
        checkpoint=folder / "state" / "training.safetensors",
        mode="float32",
        threads=1,
    )


def train_and_tell(folder: Path, splits: Any, checkpoint_seconds: float = 15.0, **wanted: Any) -> None:
    """Trains, a byte in `steps` before each step, and leaves the kept weights and figures."""
    from safetensors.torch import save_file

    from flyweight.job import guarded
    from flyweight.train.loop import train

    job = _job(folder, splits, **wanted)
    job.checkpoint_seconds = checkpoint_seconds
    steps = (folder / "steps").open("ab", buffering=0)
    job.progress = lambda share: (steps.write(b"."), None)[1]
    with guarded(folder, "the same again"):
        trained = train(job)
    save_file({name: t.contiguous() for name, t in job.net.state_dict().items()}, folder / "kept.safetensors")
    figures = {"accuracy": trained.accuracy, "loss": trained.loss, "steps": trained.steps}
    (folder / "figures.json").write_text(json.dumps(figures))


def train_in_little_memory(folder: Path, splits: Any, megabytes: int, **wanted: Any) -> None:
    """The same where only so many megabytes more can be had from the system.

    Without oneDNN, which once it has failed to find room for its code finds none any more in the same process.
    """
    import torch

    torch.backends.mkldnn.enabled = False
    _limit_memory(megabytes)
    train_and_tell(folder, splits, **wanted)


def _limit_memory(megabytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def train_as_nobody(folder: Path, splits: Any, **wanted: Any) -> None:
    """The same as a user who may only read the folder of the state, whoever runs the tests."""
    os.setuid(65534) if os.getuid() == 0 else None
    train_and_tell(folder, splits, **wanted)


def command_line(folder: Path, splits: Any, words: list[str]) -> None:
    """`flyweight` with these words."""
    from flyweight.cli import main

    os.chdir(folder)
    sys.argv = ["flyweight", *words]
    main()


# ------------------------------------------------------------------------------------------------ in the tests


class Run:
    """A child at work."""

    def __init__(self, nursery: subprocess.Popen[str], folder: Path, call: str, **args: Any) -> None:
        self.folder, self.nursery = folder, nursery
        assert nursery.stdin is not None
        nursery.stdin.write(json.dumps({"call": call, "args": args, "folder": str(folder)}) + "\n")
        nursery.stdin.flush()
        self.pid = self._told()["pid"]

    def _told(self) -> dict[str, int]:
        assert self.nursery.stdout is not None
        return json.loads(self.nursery.stdout.readline())

    def stop_after(self, steps: int, how: signal.Signals) -> None:
        """Sends a signal once so many more steps have begun, or not at all if it ends before."""
        path = self.folder / "steps"
        goal = (path.stat().st_size if path.exists() else 0) + steps
        while not path.exists() or path.stat().st_size < goal:
            if not Path(f"/proc/{self.pid}").exists() or " Z " in Path(f"/proc/{self.pid}/stat").read_text():
                return
            time.sleep(0.002)
        os.kill(self.pid, how)

    def end(self) -> int:
        """How it ended: the exit code, or minus the signal."""
        return self._told()["status"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """The process that imported torch."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_faults; test_faults.run_nursery()"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()  # which ends it


@pytest.fixture(scope="module")
def splits() -> Any:
    """Real pictures: the data that comes along."""
    from flyweight.data import open_source, prepare

    return prepare(open_source("demo"), [28])


def left(folder: Path, name: str) -> Path:
    """A folder for one run."""
    (folder / name).mkdir()
    return folder / name


def records(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, without what is said and what depends on the hour."""
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in each.items() if k not in ("at", "seconds")} for each in found if each["kind"] != "log"]


def said(folder: Path) -> str:
    """What was recorded as said."""
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(each["message"] for each in map(json.loads, lines) if each["kind"] == "log")


def same(one: Path, other: Path) -> bool:
    """Whether two runs left the same weights to the last bit, the same figures and the same records."""
    alike = [(one / name).read_bytes() == (other / name).read_bytes() for name in ("kept.safetensors", "figures.json")]
    return all(alike) and records(one) == records(other)


def test_killed_twenty_times_it_ends_as_if_undisturbed(nursery: subprocess.Popen[str], tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"epochs": 13.3, "cutout": 0.2, "mixup": 0.2, "patience": 100}
    whole, killed = left(tmp_path, "whole"), left(tmp_path, "killed")
    assert Run(nursery, whole, "train_and_tell", **wanted).end() == 0
    draw = random.Random(0)
    for _ in range(20):
        run = Run(nursery, killed, "train_and_tell", checkpoint_seconds=0.05, **wanted)
        run.stop_after(draw.randint(1, 9), signal.SIGKILL)
        assert run.end() == -signal.SIGKILL, (killed / "errors").read_text()
    assert Run(nursery, killed, "train_and_tell", checkpoint_seconds=0.05, **wanted).end() == 0
    steps = json.loads((whole / "figures.json").read_text())["steps"]
    redone = (killed / "steps").stat().st_size - steps
    assert 0 < redone < 5 * steps, "kills lost steps, which were done again"
    assert len(records(whole)) >= 10
    assert same(whole, killed)
    best = max(record["val_top1"] for record in records(whole))
    assert json.loads((killed / "figures.json").read_text())["accuracy"] == best
    assert best > records(whole)[0]["val_top1"]


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "rmsprop", "muon"])
def test_every_optimiser_goes_on_exactly(nursery: subprocess.Popen[str], tmp_path: Path, optimiser: str) -> None:
    wanted = {"epochs": 1.5, "optimiser": optimiser, "learning_rate": 0.002}
    whole, stopped = left(tmp_path, "whole"), left(tmp_path, "stopped")
    assert Run(nursery, whole, "train_and_tell", **wanted).end() == 0
    run = Run(nursery, stopped, "train_and_tell", **wanted)
    run.stop_after(7, signal.SIGINT)
    assert run.end() == 99  # KeyboardInterrupt, which the command line tells in words
    assert Run(nursery, stopped, "train_and_tell", **wanted).end() == 0
    assert same(whole, stopped)
    assert (stopped / "steps").stat().st_size == (whole / "steps").stat().st_size, "no step was lost"


@pytest.mark.parametrize("damaged", ["last", "both"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(
    nursery: subprocess.Popen[str], tmp_path: Path, damaged: str
) -> None:
    whole, stopped = left(tmp_path, "whole"), left(tmp_path, "stopped")
    assert Run(nursery, whole, "train_and_tell", epochs=2).end() == 0
    run = Run(nursery, stopped, "train_and_tell", epochs=2, checkpoint_seconds=0)
    run.stop_after(9, signal.SIGINT)
    assert run.end() == 99
    files = sorted((stopped / "state").glob("*.safetensors"))
    assert [file.name for file in files] == ["training.earlier.safetensors", "training.safetensors"]
    for file in files if damaged == "both" else files[1:]:
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1  # one bit of a weight: the file can still be read
        file.write_bytes(data)
    code = Run(nursery, stopped, "train_and_tell", epochs=2).end()
    if damaged == "last":
        assert code == 0
        assert "training.safetensors was damaged" in said(stopped)
        assert same(whole, stopped)
    else:
        assert code == 1
        told = (stopped / "errors").read_text()
        assert "both damaged" in told
        assert "delete them" in told


def test_a_full_disk_and_a_folder_that_cannot_be_written(nursery: subprocess.Popen[str], tmp_path: Path) -> None:
    whole, full = left(tmp_path, "whole"), left(tmp_path, "full")
    assert Run(nursery, whole, "train_and_tell", epochs=2).end() == 0
    run = Run(nursery, full, "train_and_tell", epochs=2)
    run.stop_after(5, signal.SIGINT)
    run.end()
    part = full / "state" / "training.safetensors.part"
    part.symlink_to("/dev/full")  # what is written there finds no space, as on a full disk
    assert Run(nursery, full, "train_and_tell", epochs=2, checkpoint_seconds=0).end() == 1
    told = (full / "errors").read_text().splitlines()[-1]
    assert "No space left on device" in told
    assert "make room" in told
    assert Run(nursery, full, "train_and_tell", epochs=2).end() == 0
    assert same(whole, full)


def test_a_read_only_folder_is_told(nursery: subprocess.Popen[str]) -> None:
    with tempfile.TemporaryDirectory() as place:  # which, unlike pytest's, others may enter
        folder = Path(place)
        (folder / "state").mkdir()
        (folder / "errors").touch()
        for each, mode in ((folder, 0o777), (folder / "errors", 0o666), (folder / "state", 0o555)):
            each.chmod(mode)
        assert Run(nursery, folder, "train_as_nobody").end() == 1
        told = (folder / "errors").read_text()
        assert "cannot be written (Permission denied): make it writable" in told
        assert not list((folder / "state").iterdir())


def test_with_too_little_memory_the_batch_goes_in_parts(nursery: subprocess.Popen[str], tmp_path: Path) -> None:
    """A real limit of the process's memory; without batch statistics the steps are the same up to rounding."""
    from safetensors.torch import load_file

    wanted: dict[str, Any] = {"net": "without norm", "epochs": 3, "batch_size": 256, "learning_rate": 0.01, "ema": 0.0}
    ample, scarce = left(tmp_path, "ample"), left(tmp_path, "scarce")
    assert Run(nursery, ample, "train_and_tell", **wanted).end() == 0
    assert Run(nursery, scarce, "train_in_little_memory", megabytes=200, **wanted).end() == 0, said(scarce)
    assert "not enough memory for 256 pictures at once" in said(scarce)
    assert "not enough memory" not in said(ample)
    one, other = (load_file(folder / "kept.safetensors") for folder in (ample, scarce))
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), other[name].numpy(), atol=2e-5)
    assert any((one[name] != other[name]).any() for name in one), "it did go another way"


def test_without_memory_for_two_pictures_it_ends_with_a_word(splits: Any, tmp_path: Path) -> None:
    from flyweight.errors import FlyweightError
    from flyweight.train.state import State

    state = State(_job(tmp_path, splits))
    for at_once in (16, 8, 4, 2):
        state.halve(32)
        assert state.at.micro == at_once
    with pytest.raises(FlyweightError, match="not enough memory to train on even two pictures"):
        state.halve(32)


TRAIN = ["train", "demo", "--model", "resnet8_cifar", "--width", "0.25", "--threads", "1"]
TRAIN += ["--set", "batch_size=500", "--set", "plain=true"]


def final(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]], dict[str, Any]]:
    """What a training by the command line left, without what depends on the hour and the place."""
    from safetensors.numpy import load_file

    weights = {name: array.tobytes() for name, array in load_file(folder / "model.safetensors").items()}
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return weights, records(folder), {key: v for key, v in result.items() if key not in ("seconds", "folder")}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_line_stops_and_goes_on(
    nursery: subprocess.Popen[str], tmp_path: Path, how: signal.Signals
) -> None:
    words = [*TRAIN, "--epochs", "1.3"]
    assert Run(nursery, tmp_path, "command_line", words=[*words, "--out", "whole"]).end() == 0
    run = Run(nursery, tmp_path, "command_line", words=[*words, "--out", "stopped"])
    while not (tmp_path / "stopped" / "state" / "training.safetensors").exists():
        time.sleep(0.002)
    time.sleep(0.3)
    os.kill(run.pid, how)
    assert run.end() == 130
    told = (tmp_path / "errors").read_text()
    assert "go on with: flyweight train --resume stopped" in told
    assert "Traceback" not in told
    assert not (tmp_path / "stopped" / "result.json").exists()
    assert Run(nursery, tmp_path, "command_line", words=["train", "--resume", "stopped"]).end() == 0
    assert final(tmp_path / "whole") == final(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "state").exists()


def test_a_loss_that_is_no_number_ends_the_command(nursery: subprocess.Popen[str], tmp_path: Path) -> None:
    words = [*TRAIN, "--set", "learning_rate=1000000.0", "--out", "run"]
    assert Run(nursery, tmp_path, "command_line", words=words).end() == 1
    told = (tmp_path / "errors").read_text()
    assert "lower the learning rate" in told.splitlines()[-1]
    assert "Traceback" not in told


def test_a_busy_machine_is_noticed(nursery: subprocess.Popen[str], tmp_path: Path) -> None:
    """A process that shares our one core."""
    core = str(min(os.sched_getaffinity(0)))
    with subprocess.Popen(["taskset", "-c", core, sys.executable, "-c", "while True: pass"]) as other:
        try:
            assert Run(nursery, tmp_path, "train_on_one_core", core=int(core), seconds=5).end() == 0
        finally:
            other.kill()
    assert said(tmp_path).count("the machine is busy with something else") == 1


def train_on_one_core(folder: Path, splits: Any, core: int, **wanted: Any) -> None:
    """The same, bound to one core."""
    os.sched_setaffinity(0, {core})
    train_and_tell(folder, splits, **wanted)


def test_work_of_other_cores_and_waiting_do_not_count() -> None:
    from flyweight.train.faults import busy_seconds

    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"cpu 9 9 9 9\ncpu0 {ticks} 0 {ticks} 7000 900 0 {ticks} {ticks} 0 0\ncpu1 {ticks} 0 0 5 0 0 0 0 0 0\nintr 1"
    assert busy_seconds(stat, [0]) == 4
    assert busy_seconds(stat, [0, 1]) == 5
    assert busy_seconds(stat, []) == 0
