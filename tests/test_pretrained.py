"""Published weights: the table, and downloads from a server on this machine that breaks off, lies or serves the wrong.

No test asks any other server.
"""

import hashlib
import io
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from flyweight import foreign, pretrained, zoo
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net
from flyweight.pretrained import Source, choose, fetch, load_pretrained, local, sources, table
from flyweight.transfer import adapt_input
from scripts.pretrained_table import PAGE, rank, with_table

BODY = bytes(range(256)) * 2000  # 512,000 bytes
SHA = hashlib.sha256(BODY).hexdigest()
NAME = f"net-{SHA[:8]}.pth"
ENTRIES = [pytest.param(each, id=each.name) for entries in table().values() for each in entries]


@dataclass
class Server:
    """What the server does with each request in turn (the last one for all further ones), and what it was asked."""

    address: str = ""
    body: bytes = BODY
    etag: str = '"one"'
    steps: list[dict[str, Any]] = field(default_factory=list)  # see Handler.do_GET
    seen: list[dict[str, str]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)  # bytes of each answer


class Handler(BaseHTTPRequestHandler):
    """A server with ranges, as its `steps` tell it.

    status: an error instead; headers: added or replaced; cut: bytes sent before the connection is closed; body and
    etag: from now on; plain: ranges are ignored.
    """

    state: Server

    def do_GET(self) -> None:
        state = self.state
        step = state.steps[min(len(state.seen), len(state.steps) - 1)] if state.steps else {}
        state.seen.append(dict(self.headers))
        state.body, state.etag = step.get("body", state.body), step.get("etag", state.etag)
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not step.get("plain") and self.headers.get("If-Range") == state.etag:
            start = int(asked[1])
        status = step.get("status", 206 if start else 200)
        rest = state.body[start:] if status < 300 else b""
        headers = {"Content-Length": str(len(rest)), "ETag": state.etag, **step.get("headers", {})}
        if start:
            headers.setdefault("Content-Range", f"bytes {start}-{len(state.body) - 1}/{len(state.body)}")
        sent = rest[: step.get("cut", len(rest))]
        state.sent.append(len(sent))
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("FLYWEIGHT_WEIGHTS", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pretrained, "PAUSE", 0.0)
    monkeypatch.setattr(pretrained, "BLOCK", 1000)
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Told", (Handler,), {"state": state}))
    state.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def source(server: Server, **changes: Any) -> Source:
    """Weights whose file's name tells the checksum, as torchvision's do."""
    entry = Source("resnet18", "torchvision", "test", url=f"{server.address}/{NAME}", sha256=SHA[:8])
    return replace(entry, **changes)


def hub_source(server: Server, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Weights of the hub, whose checksum the server states."""
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    return Source("resnet18", "timm", "resnet18.test", hub="timm/resnet18.test")


def refusal(entry: Source, folder: Path) -> str:
    """The sentence with which a download fails, after which there is no file."""
    with pytest.raises(FlyweightError) as error:
        fetch(entry, folder)
    assert not (folder / entry.file).exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def left(folder: Path) -> set[str]:
    """The files in a cache, beside the empty one of the lock."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


class TestDownload:
    def test_a_file_arrives_whole_and_once(self, server: Server, tmp_path: Path) -> None:
        path = fetch(source(server), tmp_path / "cache")
        assert path.read_bytes() == BODY
        assert left(path.parent) == {NAME}
        assert "Range" not in server.seen[0]
        assert fetch(source(server), tmp_path / "cache") == path
        assert len(server.seen) == 1  # what is there makes no request

    def test_it_goes_on_where_it_broke_off(self, server: Server, tmp_path: Path) -> None:
        server.steps = [{"cut": 300_000}, {}]
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert [request.get("Range") for request in server.seen] == [None, "bytes=300000-"]
        assert server.seen[1]["If-Range"] == '"one"'
        assert server.sent == [300_000, len(BODY) - 300_000]

    def test_another_call_goes_on_too(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pretrained, "TRIES", 1)
        server.steps = [{"cut": 300_000}, {}]
        told = refusal(source(server), tmp_path)
        assert "300,000 bytes" in told
        assert "the same command goes on from there" in told
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert server.sent == [300_000, len(BODY) - 300_000]
        assert left(tmp_path) == {NAME}

    def test_it_gives_up_after_some_tries(self, server: Server, tmp_path: Path) -> None:
        server.steps = [{"cut": 1000}]
        told = refusal(source(server), tmp_path)
        assert f"failed {pretrained.TRIES} times" in told
        assert f"{1000 * pretrained.TRIES:,} bytes of {NAME} are kept" in told
        assert len(server.seen) == pretrained.TRIES

    def test_a_file_that_changed_meanwhile_starts_anew(self, server: Server, tmp_path: Path) -> None:
        server.steps = [{"body": BODY[::-1], "cut": 300_000}, {"body": BODY, "etag": '"two"'}]
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert server.seen[1]["Range"] == "bytes=300000-"
        assert server.sent == [300_000, len(BODY)]

    @pytest.mark.parametrize(
        "headers",
        [
            {"ETag": '"two"', "Content-Range": "bytes 300000-511999/512000"},
            {"Content-Range": "bytes 300001-511999/512000"},
            {"Content-Range": ""},
        ],
    )
    def test_a_server_that_goes_on_with_something_else_is_not_believed(
        self, server: Server, tmp_path: Path, headers: dict[str, str]
    ) -> None:
        server.steps = [{"body": BODY[::-1], "cut": 300_000}, {"status": 206, "body": BODY, "headers": headers}, {}]
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert "Range" in server.seen[1]
        assert "Range" not in server.seen[2]

    def test_no_more_than_the_stated_bytes_are_taken(self, server: Server, tmp_path: Path) -> None:
        longer = {"body": BODY + bytes(700), "headers": {"Content-Range": "bytes 300500-511999/512000"}}
        server.steps = [{"cut": 300_500}, longer]
        assert fetch(source(server), tmp_path).read_bytes() == BODY

    def test_a_mark_that_promises_little_is_none(self, server: Server, tmp_path: Path) -> None:
        """A weak ETag means the same for readers, not the same bytes; a date counts."""
        weak = {"ETag": 'W/"one"'}
        dated = {**weak, "Last-Modified": "Sun, 22 Nov 2026 10:00:00 GMT"}
        server.steps = [{"cut": 300_000, "headers": weak}, {"cut": 300_000, "headers": dated}, {}]
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert [("Range" in request) for request in server.seen] == [False, False, True]
        assert server.seen[2]["If-Range"] == dated["Last-Modified"]

    def test_a_server_without_ranges_or_marks_starts_anew(self, server: Server, tmp_path: Path) -> None:
        server.steps = [{"cut": 300_000}, {"plain": True, "cut": 10, "headers": {"ETag": ""}}, {}]
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert server.sent == [300_000, 10, len(BODY)]
        assert [("Range" in request) for request in server.seen] == [False, True, False]

    def test_a_server_that_is_busy_is_asked_again(self, server: Server, tmp_path: Path) -> None:
        server.steps = [{"status": 503}, {"status": 429}, {}]
        assert fetch(source(server), tmp_path).read_bytes() == BODY

    def test_two_processes_fetch_it_once(self, server: Server, tmp_path: Path) -> None:
        script = (
            "import sys; from pathlib import Path; from flyweight.pretrained import Source, fetch\n"
            f"entry = Source('resnet18', 'torchvision', 'test', url={source(server).url!r}, sha256={SHA[:8]!r})\n"
            f"print(fetch(entry, Path({str(tmp_path)!r})))"
        )
        both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
        answers = {process.communicate(timeout=120)[0].strip() for process in both}
        assert answers == {str(tmp_path / NAME)}
        assert (tmp_path / NAME).read_bytes() == BODY
        assert server.sent == [len(BODY)]

    def test_a_second_process_waits_for_the_first(self, server: Server, tmp_path: Path) -> None:
        """The lock, held here, keeps another process from the file until it is let go."""
        entry = source(server)
        script = (
            "from pathlib import Path; from flyweight.pretrained import Source, fetch\n"
            f"entry = Source('resnet18', 'torchvision', 'test', url={entry.url!r}, sha256={SHA[:8]!r})\n"
            f"print('ready', flush=True); fetch(entry, Path({str(tmp_path)!r}))"
        )
        with pretrained._locked(tmp_path / f"{NAME}.lock"):
            other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(0.5)
            assert server.seen == []
            (tmp_path / NAME).write_bytes(BODY)
        other.communicate(timeout=60)
        assert other.returncode == 0
        assert server.seen == []


class TestRefusals:
    def test_a_wrong_file(self, server: Server, tmp_path: Path) -> None:
        server.body = b"<html>sign in first</html>"
        assert f"instead of {SHA[:8]}; it was not kept" in refusal(source(server), tmp_path)
        assert left(tmp_path) == set()
        server.body = BODY
        assert fetch(source(server), tmp_path).read_bytes() == BODY

    @pytest.mark.parametrize("more", [1000, -1000])
    def test_a_lie_about_the_length(self, server: Server, tmp_path: Path, more: int) -> None:
        """Stated too long, the end never comes; stated too short, what arrives is not the published file."""
        server.steps = [{"headers": {"Content-Length": str(len(BODY) + more)}, "plain": True}]
        told = refusal(source(server), tmp_path)
        if more > 0:
            assert f"ended after {len(BODY):,} of {len(BODY) + more:,} bytes" in told
        else:
            assert "is not the published file" in told

    def test_no_length(self, server: Server, tmp_path: Path) -> None:
        server.steps = [{"headers": {"Content-Length": ""}}]
        assert "does not say how long" in refusal(source(server), tmp_path)

    def test_more_than_any_weights(self, server: Server, tmp_path: Path) -> None:
        server.steps = [{"headers": {"Content-Length": str(10**12)}, "cut": 0}]
        assert "1,000,000,000,000 bytes" in refusal(source(server), tmp_path)
        assert left(tmp_path) == set()

    def test_not_found(self, server: Server, tmp_path: Path) -> None:
        server.steps = [{"status": 404}]
        told = refusal(source(server), tmp_path)
        assert "answers 404 Not Found" in told
        assert f"as {NAME} into {tmp_path}" in told
        assert len(server.seen) == 1

    def test_offline(self, server: Server, tmp_path: Path) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        told = refusal(source(server, url=f"http://127.0.0.1:{port}/{NAME}"), tmp_path)
        assert told.startswith(f"cannot reach 127.0.0.1:{port} (")
        assert f"as {NAME} into {tmp_path} or into a folder that FLYWEIGHT_WEIGHTS names" in told

    def test_a_silent_server(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pretrained, "TIMEOUT", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            told = refusal(source(server, url=f"http://127.0.0.1:{silent.getsockname()[1]}/{NAME}"), tmp_path)
        assert "timed out" in told

    def test_a_folder_that_cannot_be_made(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        assert "set FLYWEIGHT_CACHE to another folder" in refusal_in(source(server), tmp_path / "file" / "cache")
        assert server.seen == []

    def test_a_redirect_to_an_unprotected_address(self) -> None:
        from urllib.request import Request

        redirects = pretrained._Redirects()
        with pytest.raises(FlyweightError, match="not protected"):
            redirects.redirect_request(
                Request("https://a.example/x"),
                io.BytesIO(),
                302,
                "",
                {},
                "http://b.example/x",  # type: ignore[arg-type]
            )


def refusal_in(entry: Source, folder: Path) -> str:
    with pytest.raises(FlyweightError) as error:
        fetch(entry, folder)
    return str(error.value)


class TestHub:
    """The hub refers to another server and states size and sha256 on the way."""

    def refer(self, server: Server, sha256: str = SHA, size: int = len(BODY)) -> dict[str, Any]:
        linked = {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(size), "ETag": '"0123"'}
        return {"status": 302, "headers": {"Location": f"{server.address}/cdn/1", **linked}}

    def test_a_file_is_checked_by_what_the_hub_states(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entry = hub_source(server, monkeypatch)
        assert entry.address == f"{server.address}/timm/resnet18.test/resolve/main/model.safetensors"
        # The second server's ETag has the form of a sha256 too; what the hub says counts.
        server.steps = [self.refer(server), {"etag": f'"{"0" * 64}"', "cut": 400_000}, self.refer(server), {}]
        path = fetch(entry, tmp_path)
        assert path == tmp_path / "resnet18.test.safetensors"
        assert path.read_bytes() == BODY
        assert server.seen[3]["Range"] == "bytes=400000-"  # goes on through the referral

    def test_a_wrong_file(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        server.steps = [self.refer(server, sha256="ab" * 32), {}]
        assert "is not the published file" in refusal(hub_source(server, monkeypatch), tmp_path)

    def test_another_length(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        server.steps = [self.refer(server, size=1000), {}]
        told = refusal(hub_source(server, monkeypatch), tmp_path)
        assert "offers 512,000 bytes" in told
        assert "which has 1,000" in told

    def test_no_checksum(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "states no sha256" in refusal(hub_source(server, monkeypatch), tmp_path)
        assert left(tmp_path) == set()


class TestPlaces:
    def test_the_named_folder_comes_first_and_is_never_written(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, cache = tmp_path / "own", tmp_path / "cache"
        own.mkdir()
        (own / NAME).write_bytes(BODY)
        monkeypatch.setenv("FLYWEIGHT_WEIGHTS", str(own))
        assert fetch(source(server), cache) == own / NAME
        assert server.seen == []
        assert not cache.exists()
        (own / NAME).unlink()
        assert local(source(server), cache) is None
        assert fetch(source(server), cache) == cache / NAME
        assert list(own.iterdir()) == []

    def test_a_wrong_file_there_is_named(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLYWEIGHT_WEIGHTS", str(tmp_path))
        (tmp_path / NAME).write_bytes(b"something else")
        with pytest.raises(FlyweightError, match=f"{NAME} is not the published file"):
            fetch(source(server), tmp_path / "cache")

    def test_the_cache_is_where_other_caches_are(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("FLYWEIGHT_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert fetch(source(server)) == tmp_path / "flyweight" / "weights" / NAME


def published(server: Server, folder: Path, entry: Source) -> Net:
    """Puts weights into the cache as the source's library would name them; the network that they are of."""
    torch.manual_seed(1)
    net = zoo.build(entry.spec())
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    tensors = foreign.give(net, "torchvision")
    data = io.BytesIO()
    torch.save(tensors, data)
    server.body = save(tensors) if entry.file.endswith(".safetensors") else data.getvalue()
    return net.eval()


def squeezenet(server: Server, **changes: Any) -> Source:
    """SqueezeNet as the source of `server`'s body, once `published` has put it there."""
    entry = Source("squeezenet1_1", "torchvision", "test", f"{server.address}/net.pth", mean=(0.4, 0.5, 0.6))
    return replace(entry, std=(0.1, 0.2, 0.3), resize=256, interpolation="bilinear", **changes)


class TestLoading:
    def load(self, server: Server, folder: Path, entry: Source, **args: Any) -> tuple[Net, Net, list[str]]:
        """The published network, ours with arguments, and what was said."""
        donor = published(server, folder, entry)
        entry = replace(entry, sha256=hashlib.sha256(server.body).hexdigest()[:8])
        net = zoo.build(zoo.spec_of(entry.model, **args))
        return donor, net.eval(), load_pretrained(net, entry, folder)

    def test_the_same_network_answers_the_same(self, server: Server, tmp_path: Path) -> None:
        donor, net, changes = self.load(server, tmp_path, squeezenet(server))
        pictures = torch.rand(2, 3, 64, 64)
        assert torch.equal(net(pictures), donor(pictures))
        assert changes == []
        cfg = net.pretrained_cfg
        assert (cfg["mean"], cfg["std"], cfg["crop_pct"]) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3), 0.875)

    def test_other_classes_keep_all_but_the_classifier(self, server: Server, tmp_path: Path) -> None:
        donor, net, changes = self.load(server, tmp_path, squeezenet(server), num_classes=7)
        pictures = torch.rand(1, 3, 64, 64)
        assert torch.equal(net.forward_features(pictures), donor.forward_features(pictures))
        assert net(pictures).shape == (1, 7)
        assert changes == ["the classifier for 1000 classes was dropped, that for 7 is untrained"]

    def test_no_classes(self, server: Server, tmp_path: Path) -> None:
        *_, changes = self.load(server, tmp_path, squeezenet(server), num_classes=0)
        assert changes == ["the classifier for 1000 classes was dropped, the network has none"]

    def test_grey_pictures_are_seen_as_grey_colours(self, server: Server, tmp_path: Path) -> None:
        donor, net, changes = self.load(server, tmp_path, squeezenet(server), in_chans=1)
        grey = torch.rand(1, 1, 64, 64)
        torch.testing.assert_close(net(grey), donor(grey.expand(-1, 3, -1, -1)))
        assert changes == ["the first convolution's kernels were summed for grey"]
        assert net.pretrained_cfg["mean"] == pytest.approx((0.5,))

    def test_more_channels_take_the_colours_in_turn(self) -> None:
        weight = torch.rand(4, 3, 3, 3)
        wider = adapt_input(weight, 5)
        torch.testing.assert_close(wider, torch.cat([weight, weight[:, :2]], 1) * 3 / 5)

    def test_auxiliary_heads(self, server: Server, tmp_path: Path) -> None:
        entry = Source("googlenet", "torchvision", "test", f"{server.address}/net.pth", mean=(0.5,) * 3, std=(0.5,) * 3)
        donor, net, changes = self.load(server, tmp_path, entry, aux=False, num_classes=0)
        pictures = torch.rand(1, 3, 64, 64)
        assert torch.equal(net(pictures), donor.forward_head(donor.forward_features(pictures), pre_logits=True))
        assert changes[1:] == ["the auxiliary heads were dropped"]

    def test_a_network_that_computes_something_else_is_told(self, server: Server, tmp_path: Path) -> None:
        entry = squeezenet(server, args={"padding": "same"})
        assert entry.padding == "same"
        *_, changes = self.load(server, tmp_path, entry)
        assert changes == ["padding is 'symmetric', the weights were trained with 'same'"]

    def test_another_shape_is_refused(self, server: Server, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="do not fit this squeezenet"):
            self.load(server, tmp_path, squeezenet(server), width=1.5)

    def test_a_narrower_network_takes_the_largest_filters(self, server: Server, tmp_path: Path) -> None:
        *_, changes = self.load(server, tmp_path, squeezenet(server), width=0.5)
        assert any("with the largest filters" in change for change in changes)

    def test_a_file_of_another_network_is_refused(self, server: Server, tmp_path: Path) -> None:
        published(server, tmp_path, squeezenet(server))
        entry = replace(squeezenet(server), model="resnet18", sha256=hashlib.sha256(server.body).hexdigest())
        with pytest.raises(FlyweightError, match="does not hold test: "):
            load_pretrained(zoo.build(entry.spec()), entry, tmp_path)


class TestChoice:
    def test_the_best_that_fits(self) -> None:
        assert choose("resnet18", num_classes=3, in_chans=1) == sources("resnet18")[0]
        assert choose("mobilenet_v2", width=1.4).args["width"] == 1.4
        assert "width" not in choose("mobilenet_v2").args
        assert choose("inception_v3", num_classes=5, aux=True) == sources("inception_v3")[0]

    def test_none_that_fits(self) -> None:
        with pytest.raises(UsageError, match=r"no published weights of mobilenet_v2 fit width=0.5: "):
            choose("mobilenet_v2", width=0.5)
        with pytest.raises(UsageError, match=r"no weights of resnet10 are published, but of resnet101, .*resnet50"):
            choose("resnet10")


class TestTable:
    @pytest.mark.parametrize("entry", ENTRIES)
    def test_an_entry_is_complete(self, entry: Source) -> None:
        spec = entry.spec()
        assert spec.input == (3, *entry.size)
        assert bool(entry.url) != bool(entry.hub)
        if entry.url:
            assert re.fullmatch(r"[0-9a-f]{8,64}", entry.sha256)
            assert re.search(rf"-{entry.sha256}\.pth$", entry.file)
            assert entry.url.startswith("https://")
        else:
            assert entry.hub == f"timm/{entry.name}"
            assert entry.sha256 == ""
        assert entry.resize is not None
        assert max(entry.size) <= entry.resize
        assert len(entry.mean) == len(entry.std) == 3
        assert entry.interpolation in ("bilinear", "bicubic")
        assert 50 < entry.metrics.get("top1", 75) < entry.metrics.get("top5", 95) < 100
        assert 1e6 < entry.bytes < pretrained.LIMIT
        with torch.device("meta"):
            net = zoo.structure(spec)
        assert entry.bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values())
        assert foreign.libraries(net)

    def test_files_have_names_of_their_own(self) -> None:
        files = [param.values[0].file for param in ENTRIES]
        assert len(files) == len(set(files)) > 100

    def test_entries_are_sorted(self) -> None:
        for entries in table().values():
            ranks = [rank({"licence": each.licence, "metrics": each.metrics}) for each in entries]
            assert ranks == sorted(ranks)

    def test_the_input_is_what_the_network_sees(self) -> None:
        """torchvision's ports from TensorFlow re-normalise their input to -1…1 whatever their transforms state."""
        for name in ("googlenet", "inception_v3"):
            (entry,) = (each for each in sources(name) if each.library == "torchvision")
            assert entry.mean == entry.std == (0.5, 0.5, 0.5)
            assert "transform_input" in entry.note

    def test_the_page_is_up_to_date(self) -> None:
        text = PAGE.read_text(encoding="utf-8")
        assert with_table(text, table()) == text, "python -m scripts.pretrained_table writes it anew"
