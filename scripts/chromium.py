"""Chromium for tests and benchmarks of the web page, and the servers that give it the page."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMAND = "chromium"


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def served(folder: Path, isolated: bool) -> Iterator[str]:
    """The address of a folder, with the headers of serve.py or as a plain server gives it."""
    port = str(free_port())
    plain = ["-m", "http.server", port, "--bind", "127.0.0.1", "--directory", folder]
    command = [sys.executable, *([folder / "serve.py", port] if isolated else plain)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@dataclass
class Browser:
    """Chromium, driven through a pair of pipes: JSON messages that end in NUL."""

    process: subprocess.Popen[bytes]
    to: int
    source: int
    rest: bytes = b""
    count: int = 0
    session: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        """The next thing that it says."""
        while b"\0" not in self.rest:
            part = os.read(self.source, 1 << 16)
            if not part:
                raise RuntimeError("Chromium ended")
            self.rest += part
        first, self.rest = self.rest.split(b"\0", 1)
        return json.loads(first)

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are kept."""
        self.count += 1
        asked = {"id": self.count, "method": method, "params": params}
        os.write(self.to, json.dumps(asked | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (said := self.message()).get("id") != self.count:
            self.events.append(said)
        if "error" in said:
            raise RuntimeError(said)
        return said["result"]

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression in the page."""
        result = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result)
        return result["result"].get("value")

    def open(self, url: str) -> None:
        """A new page, of which requests, errors and messages are kept."""
        self.session, self.events = None, []
        page = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.do("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "DOM", "Runtime", "Log"):
            self.do(f"{domain}.enable")
        self.do("Page.navigate", url=url)
        self.until("Ready")

    def until(self, status: str, seconds: float = 90) -> str:
        """What the page says, once that starts with `status`."""
        end, said = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            said = self.value("document.getElementById('status')?.textContent") or ""
            if said.startswith(status):
                return said
            time.sleep(0.05)
        raise RuntimeError(f"the page says {said!r}; {self.complaints()}")

    def choose(self, path: Path, status: str = "Answered") -> str:
        """What the page says to a file."""
        self.value("document.getElementById('status').textContent = ''")
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        found = self.do("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.do("DOM.setFileInputFiles", nodeId=found, files=[str(path)])
        return self.until(status)

    def answers(self) -> dict[str, float]:
        """Names and probabilities as the page lists them."""
        items = "[...document.querySelectorAll('#answers li')]"
        listed = "[each.querySelector('.name').textContent, each.querySelector('progress').value]"
        return dict(self.value(f"{items}.map((each) => {listed})"))

    def complaints(self) -> list[dict[str, Any]]:
        """What went wrong, by the browser's own log."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [each for each in self.events if each.get("method") in kinds]

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        sent = [each["params"] for each in self.events if each.get("method") == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser without a window, whose data are in the folder `profile`."""
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync remote-debugging-pipe"
    )
    (theirs, to), (source, back) = os.pipe(), os.pipe()
    # Chromium reads commands from descriptor 3 and writes to 4.
    put = "import fcntl, os, sys; high = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]; "
    put += "os.dup2(high[0], 3); os.dup2(high[1], 4); os.execvp(sys.argv[3], sys.argv[3:])"
    arguments = [COMMAND, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={profile}"]
    with (profile / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", put, str(theirs), str(back), *arguments],
            pass_fds=(theirs, back),
            stdout=log,
            stderr=log,
        )
    os.close(theirs)
    os.close(back)
    found = Browser(process, to, source)
    yield found
    found.session = None
    found.do("Browser.close")
    process.wait(timeout=30)
    os.close(to)
    os.close(source)
