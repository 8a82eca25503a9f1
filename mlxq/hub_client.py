"""The HTTP client that ``huggingface_hub`` uses, changed where it would wait or give up without a word."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from typing import Any

_preparing = threading.Lock()


def prepare_client() -> None:
    """Give ``huggingface_hub`` a client that leaves patience to ``retry``. Again has no effect.

    The library resumes a download after errors of the protocol alone, and its HTTP library (httpx, or httpx2) calls a
    reset an error of reading: here both are the same. It also sleeps through a 429, for minutes and in silence: here
    that is an error at once.
    """
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    with _preparing:
        session = get_session()
        if getattr(session, "leaves_patience_to_mlxq", False):
            return
        http: Any = importlib.import_module(type(session).__module__.partition(".")[0])

        class Body(http.SyncByteStream):  # type: ignore[misc]
            def __init__(self, inner: Any) -> None:
                self.inner = inner

            def __iter__(self) -> Iterator[bytes]:
                try:
                    yield from self.inner
                except http.ReadError as exc:
                    raise http.RemoteProtocolError(str(exc)) from exc

            def close(self) -> None:
                self.inner.close()

        class Client(http.Client):  # type: ignore[misc]
            leaves_patience_to_mlxq = True

            def send(self, request: Any, **how: Any) -> Any:
                response = super().send(request, **how)
                if response.status_code == 429:
                    response.read()
                    hf_raise_for_status(response)
                response.stream = Body(response.stream)
                return response

        def client() -> Any:
            return Client(event_hooks=session.event_hooks, follow_redirects=True, timeout=None)

        set_client_factory(client)
