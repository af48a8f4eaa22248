"""Serves this folder to this computer alone, with the headers that let a page use several threads: serve.py [PORT]."""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Isolated(SimpleHTTPRequestHandler):
    """Files, with the headers of a cross-origin isolated page."""

    # Said here because some systems' own tables have other types, which browsers refuse for modules.
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        """Adds ours to those that every answer has."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # so that a newer export is seen
        super().end_headers()


def server(port: int) -> ThreadingHTTPServer:
    """A server of this folder on the loopback address; port 0 is any free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Isolated, directory=str(Path(__file__).parent)))


if __name__ == "__main__":
    with server(int(sys.argv[1]) if len(sys.argv) > 1 else 8000) as here:
        print(f"http://127.0.0.1:{here.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            here.serve_forever()
        except KeyboardInterrupt:
            print()
