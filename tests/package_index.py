"""A Python package index on loopback: real HTTP for the real pip, slow where a test asks for it, with a log."""

from __future__ import annotations

import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_PIECE = 1 << 12


class PackageIndex:
    """Files offered for download, by project as PEP 503 lists them. Fields may be changed while it runs."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.log: list[str] = []
        self.bytes_per_second: float | None = None
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.log.append(self.path)
                index.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"

    def __enter__(self) -> PackageIndex:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        _, kind, name, *_ = [*request.path.split("/"), ""]
        if kind == "simple":
            project = name.replace("-", "_")
            links = [f'<a href="/files/{file}">{file}</a>' for file in self.files if file.startswith(f"{project}-")]
            body, content_type = f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode(), "text/html"
        else:
            body, content_type = self.files.get(name, b""), "application/octet-stream"
        request.send_response(200 if body else 404)
        request.send_header("Content-Type", content_type)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        try:
            for start in range(0, len(body), _PIECE):
                request.wfile.write(body[start : start + _PIECE])
                if kind == "files" and self.bytes_per_second:
                    time.sleep(_PIECE / self.bytes_per_second)
        except (BrokenPipeError, ConnectionResetError):
            self.log.append(f"{request.path} dropped")

    def downloads(self) -> list[str]:
        """The files asked for, and those whose reader went away."""
        return [path for path in list(self.log) if path.startswith("/files/")]


def wheel(folder: Path, package: str, version: str, members: dict[str, bytes]) -> Path:
    """A wheel for every platform that holds ``members`` and needs a package that nobody has."""
    project = package.replace("-", "_")
    about = f"{project}-{version}.dist-info"
    file = folder / f"{project}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nRequires-Dist: no-such-package-anywhere\n"
    tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", tags)
        archive.writestr(f"{about}/RECORD", "")
    return file
