"""Which weights a job starts from: a file, what is cached, what a server on this machine has. No other is asked."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from flyweight import data, foreign, pretrained
from flyweight.create import create_model
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Spec
from flyweight.preprocess import Preprocess
from flyweight.search.budget import Budget
from flyweight.search.donor import Donor, find_donor, open_donor
from flyweight.search.space import adapted, pretrained_candidates
from flyweight.search.supply import FILES, Supply, suits, supply
from flyweight.weights import net_bytes
from flyweight.zoo import build, spec_of

PUBLISHED = "mobilenetv2_050.lamb_in1k.safetensors"
GREY = Preprocess((64, 64), 1, (72.0,), (90.0,))


def weights_of(name: str) -> bytes:
    """A network's random weights, as timm's file of it would name them."""
    torch.manual_seed(3)
    return save(foreign.give(build(pretrained.sources(name)[0].spec()), "timm"))


@pytest.fixture(scope="module")
def published() -> bytes:
    return weights_of("mobilenet_v2_050")


def own_net(size: int = 64) -> bytes:
    torch.manual_seed(0)
    net = create_model("airbench94", num_classes=4, in_chans=1, width=0.25, size=size)
    return net_bytes(net, replace(GREY, size=(size, size)))


def pictures(side: int, channels: int = 3) -> data.Source:
    """A source of which only size, channels and classes matter here."""
    nothing = np.zeros((2, side, side, channels), np.uint8)
    labels = np.arange(2)
    return data.Source(Path(), "x", nothing, labels, ("a", "b"), np.array(["", ""]), ["", ""], channels, (side, side))


@dataclass
class Hub:
    """A server of weights: how long it waits, what it sends, what it was asked for."""

    address: str
    body: bytes = b""
    wait: float = 0.0
    asked: tuple[str, ...] = ()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine in the place of the real one, and empty folders of weights."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked += (self.path,)
            time.sleep(state.wait)
            self.send_response(200 if state.body else 404)
            self.send_header("Content-Length", str(len(state.body)))
            self.send_header("ETag", f'"{hashlib.sha256(state.body).hexdigest()}"')
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *_: object) -> None:
            """Silence."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Hub(f"http://127.0.0.1:{http.server_address[1]}")
    monkeypatch.setenv("HF_ENDPOINT", state.address)
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLYWEIGHT_WEIGHTS", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def of_v2(spec: Spec) -> bool:
    """Only MobileNetV2 at half its width, which the hub has."""
    return spec.family == "mobilenet_v2" and spec.args.get("width") == 0.5


def anything(spec: Spec) -> bool:
    return True


class TestSuits:
    """By size and by exact cost."""

    @pytest.mark.parametrize(("side", "expected"), [(28, False), (64, False), (123, False), (128, True), (224, True)])
    def test_the_pictures_are_large_enough(self, side: int, expected: bool) -> None:
        assert suits(spec_of("mobilenet_v2_050"), pictures(side), Budget.parse("latency<=2ms")) is expected

    def test_small_networks_are_for_small_pictures(self) -> None:
        small, budget = spec_of("airbench94", num_classes=4, size=32), Budget.parse("latency<=2ms")
        assert suits(small, pictures(28), budget)
        assert not suits(small, pictures(224), budget)

    @pytest.mark.parametrize(
        ("budget", "expected"), [("size<=1MB", True), ("size<=600KB", False), ("macs<=40M", True), ("macs<=20M", False)]
    )
    def test_the_budget_is_judged_at_the_job_s_classes_and_sizes(self, budget: str, expected: bool) -> None:
        """0.69 million weights for two classes; at 224 pixels 96 million MACs, at 128 a third."""
        assert suits(spec_of("mobilenet_v2_050"), pictures(224), Budget.parse(budget)) is expected


class TestCached:
    def test_published_and_own_files_are_found_and_named(self, hub: Hub, tmp_path: Path, published: bytes) -> None:
        (tmp_path / "own" / PUBLISHED).write_bytes(published)
        cache = tmp_path / "cache" / "weights"
        cache.mkdir(parents=True)
        (cache / "earlier.safetensors").write_bytes(own_net())
        (cache / "stranger.safetensors").write_bytes(save({"weight": torch.zeros(1)}))
        (cache / "notes.txt").write_text("not weights")
        found = supply(None, anything, 0)
        assert found.notes == ()
        assert [(each.name, each.licence, each.path) for each in found.donors] == [
            ("mobilenetv2_050.lamb_in1k", "apache-2.0", tmp_path / "own" / PUBLISHED),
            ("earlier", "", cache / "earlier.safetensors"),
        ]
        assert [each.sha256 for each in found.donors] == [
            hashlib.sha256(each.path.read_bytes()).hexdigest() for each in found.donors
        ]
        assert supply("auto", anything, 0) == found
        assert supply("auto", of_v2, 0).donors == found.donors[:1]
        assert supply("none", anything, 0) == Supply()
        assert hub.asked == ()

    def test_nothing_is_asked_of_the_network_unless_somebody_says_auto(self, hub: Hub) -> None:
        assert supply(None, anything, 5) == Supply()
        assert hub.asked == ()

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            (PUBLISHED, "does not hold mobilenetv2_050.lamb_in1k"),
            ("squeezenet1_1-b8a52dc0.pth", "is not the published file"),
        ],
    )
    def test_a_wrong_file_is_told_and_passed_over(self, hub: Hub, tmp_path: Path, name: str, told: str) -> None:
        """By its tensors, and where the publisher states a checksum, by that: these are other weights of SqueezeNet."""
        torch.save(foreign.give(build(spec_of("squeezenet1_1")), "torchvision"), tmp_path / "own" / name)
        if name == PUBLISHED:
            (tmp_path / "own" / name).write_bytes(save({"weight": torch.zeros(1)}))
        (tmp_path / "own" / "earlier.safetensors").write_bytes(own_net())
        found = supply(None, anything, 0)
        assert [each.name for each in found.donors] == ["earlier"]
        assert len(found.notes) == 1
        assert f"own/{name} {told}" in found.notes[0]
        assert found.notes[0].startswith("weights that are not used: ")

    def test_weights_without_commercial_use_are_only_taken_by_name(self, hub: Hub, tmp_path: Path) -> None:
        restricted = next(each for each in pretrained.sources("resnet18") if "-nc" in each.licence)
        (tmp_path / "own" / restricted.file).write_bytes(b"never read")
        assert supply(None, anything, 0) == Supply()


class TestDownload:
    def test_the_smallest_that_suits_is_fetched_once(self, hub: Hub, tmp_path: Path, published: bytes) -> None:
        hub.body = published
        found = supply("auto", of_v2, 60)
        assert [each.name for each in found.donors] == ["mobilenetv2_050.lamb_in1k"]
        assert found.donors[0].path == tmp_path / "cache" / "weights" / PUBLISHED
        assert found.notes == ()
        assert supply("auto", of_v2, 60) == supply(None, of_v2, 60) == found
        assert hub.asked == ("/timm/mobilenetv2_050.lamb_in1k/resolve/main/model.safetensors",)

    def test_few_and_small_files_are_wanted(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[pretrained.Source] = []

        def refuse(source: pretrained.Source) -> Path:
            asked.append(source)
            raise FlyweightError("no server today")

        monkeypatch.setattr(pretrained, "fetch", refuse)
        found = supply("auto", anything, 60)
        assert found.donors == ()
        assert len(asked) == len({each.spec().family for each in asked}) == FILES
        assert max(each.bytes for each in asked) < 6_000_000
        assert found.notes == ("no weights are cached; no server today; every candidate starts from random weights",)

    def test_offline_it_says_so(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        found = supply("auto", of_v2, 60)
        assert found.donors == ()
        assert found.notes[0].startswith("no weights are cached; cannot reach 127.0.0.1:9 (")
        assert found.notes[0].endswith("; every candidate starts from random weights")

    def test_a_slow_server_is_not_waited_for(self, hub: Hub) -> None:
        hub.wait = 0.5
        found = supply("auto", of_v2, 0.01)
        assert found.donors == ()
        assert "did not arrive from 127.0.0.1" in found.notes[0]
        while not hub.asked:  # the thread that was left is at work
            time.sleep(0.01)

    def test_where_nothing_suits_it_says_so(self, hub: Hub) -> None:
        found = supply("auto", lambda spec: False, 60)
        assert found.notes == (
            "no published weights suit these pictures and this budget: every candidate starts from random weights",
        )
        assert hub.asked == ()


class TestDonor:
    def test_published_weights_answer_as_they_did(self, tmp_path: Path, published: bytes) -> None:
        (tmp_path / "x.safetensors").write_bytes(published)
        source = pretrained.sources("mobilenet_v2_050")[0]
        donor = open_donor(tmp_path / "x.safetensors", source)
        torch.manual_seed(3)
        net = build(source.spec()).eval()
        x = torch.rand(1, 3, 64, 64)
        assert torch.equal(donor.net()(x), net(x))
        preprocess = donor.preprocess()
        assert (preprocess.size, preprocess.channels) == ((224, 224), 3)
        assert preprocess.mean == pytest.approx((123.675, 116.28, 103.53))
        assert preprocess.std == pytest.approx((58.395, 57.12, 57.375))

    def test_it_is_the_same_after_json(self, tmp_path: Path, published: bytes) -> None:
        (tmp_path / "x.safetensors").write_bytes(published)
        (tmp_path / "own.safetensors").write_bytes(own_net())
        for source in (pretrained.sources("mobilenet_v2_050")[0], None):
            donor = open_donor(tmp_path / ("x.safetensors" if source else "own.safetensors"), source)
            assert Donor.from_json(json.loads(json.dumps(donor.to_json()))) == donor
        with pytest.raises(UsageError, match="knows no weights gone of timm"):
            Donor.from_json({"path": "x", "sha256": "", "library": "timm", "name": "gone"})

    def test_a_run_s_weights_have_its_folder_s_name(self, tmp_path: Path) -> None:
        (tmp_path / "flowers").mkdir()
        (tmp_path / "flowers" / "model.safetensors").write_bytes(own_net())
        assert find_donor(str(tmp_path / "flowers")).name == "flowers"

    @pytest.mark.parametrize("fault", ["gone", "other"])
    def test_a_file_that_is_no_more_what_it_was_is_refused(self, tmp_path: Path, fault: str) -> None:
        path = tmp_path / "own.safetensors"
        path.write_bytes(own_net())
        donor = open_donor(path)
        donor.check()
        if fault == "gone":
            path.unlink()
        else:
            path.write_bytes(own_net(size=60))
        with pytest.raises(UsageError, match=r"own\.safetensors.* start the job anew"):
            donor.check()

    def test_candidates_say_what_they_start_from(self, tmp_path: Path) -> None:
        (tmp_path / "own.safetensors").write_bytes(own_net())
        pool = pretrained_candidates(open_donor(tmp_path / "own.safetensors"), (32, 48, 64, 96), 3, 7)
        assert [each.name for each in pool] == ["airbench x0.25 @64 from own", "airbench x0.25 @48 from own"]
        assert [each.to_json()["weights"] for each in pool] == ["own", "own"]
        assert {each.spec.input[0] for each in pool} == {3}
        assert {each.spec.args["num_classes"] for each in pool} == {7}

    def test_what_was_pruned_stays_pruned(self) -> None:
        spec = Spec("airbench", {"width": 0.25}, (3, 64, 64), {"stem": 5})
        assert [each.widths for each in adapted(spec, (64,), 1, 2)] == [{"stem": 5}]
