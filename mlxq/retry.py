"""What an error of ``huggingface_hub`` means, and whether waiting helps.

Shared by reading and publishing: where an exception came from, the Hub's answer behind it, and how long to wait
before the same is tried again.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from mlxq.errors import MlxqError
from mlxq.hub_client import prepare_client

TRIES = 5
# The Hub counts requests by windows of five minutes; what asks for more than an hour at once is no such limit.
LONGEST_WAIT_S = 3600.0
_T = TypeVar("_T")
_Event = TypeVar("_Event")


@dataclass(frozen=True)
class Waiting:
    """The Hub asked for patience, or could not be reached: the same is tried again in ``seconds``."""

    seconds: float
    reason: str


def patiently(
    call: Callable[[], _T], explained: Callable[[Exception], MlxqError], *, once: bool = False
) -> Generator[Waiting, None, _T]:
    """Call the Hub; wait and call again where it asks to, has trouble of its own, or was cut off.

    With ``once`` only a refusal is tried again, not a request whose answer may have been lost. What is left after
    ``TRIES`` is raised as ``explained`` has it; a wait that the Hub itself names is no try, however often it does.
    Errors that are not the Hub's pass through.
    """
    prepare_client()
    tries = 0
    while True:
        tries += 1
        try:
            return call()
        except Exception as exc:
            if not from_the_hub(exc):
                raise
            wait = waiting_for(exc, tries, once=once)
            if wait is None or tries >= TRIES:
                raise explained(exc) from exc
            if named_wait_s(exc):
                tries -= 1
            yield wait
            time.sleep(wait.seconds)


def waiting_for(exc: Exception, tries: int, *, once: bool = False) -> Waiting | None:
    """How long to wait before trying again; None where that would not help."""
    response = response_of(exc)
    if response is not None and response.status_code == 429:
        named = named_wait_s(exc)
        seconds = 15.0 * tries if named is None else named
        return Waiting(seconds, "the Hub limits how often it may be asked") if seconds <= LONGEST_WAIT_S else None
    if once or is_offline(exc):
        return None
    if response is None or response.status_code < 400:
        return Waiting(2.0 ** (tries - 1), "the connection to the Hub broke")
    if response.status_code >= 500:
        return Waiting(2.0 ** (tries - 1), f"the Hub answered {response.status_code}")
    return None


def named_wait_s(exc: BaseException) -> float | None:
    """How long the Hub asks to be left alone, where it limits requests (429) and says so; None else.

    From ``Retry-After`` (RFC 9110: seconds, or a date), or the ``RateLimit`` fields of the IETF's drafts:
    ``"api";r=0;t=280``, ``limit=500, remaining=0, reset=280``, or ``RateLimit-Reset: 280``.
    """
    response = response_of(exc)
    if response is None or response.status_code != 429:
        return None
    headers: Mapping[str, str] = response.headers
    after = headers.get("Retry-After", "").strip()
    if after.isdecimal():
        return float(after)
    if after:
        try:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
        except (ValueError, OverflowError):
            pass  # Neither of the two: the other fields may know.
    named = [float(seconds) for seconds in _spent_limits(headers.get("RateLimit", ""))]
    reset = headers.get("RateLimit-Reset", "").strip()
    return max(named, default=float(reset) if reset.isdecimal() else None)


def _spent_limits(field: str) -> Iterator[str]:
    """Seconds until each limit in a ``RateLimit`` field begins anew, of those that nothing is left of."""
    if reset := re.search(r"\breset\s*=\s*(\d+)", field):
        yield reset[1]
    for limit in field.split(","):
        parts = dict(re.findall(r";\s*(\w+)\s*=\s*(\d+)", limit))
        if "t" in parts and int(parts.get("r", 0)) == 0:
            yield parts["t"]


def limited(exc: BaseException) -> str:
    """Why the Hub is not asked again after a 429."""
    named = named_wait_s(exc)
    if named is not None and named > LONGEST_WAIT_S:
        return f"the Hub limits how often it may be asked, and asks to wait {named:,.0f} s"
    return f"the Hub still limits how often it may be asked, after {TRIES} tries"


def chain(exc: BaseException) -> Iterator[BaseException]:
    """An exception, then what it was raised from, and so on."""
    current: BaseException | None = exc
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def from_the_hub(exc: Exception) -> bool:
    """Whether ``huggingface_hub`` raised it, or what it stands on: an HTTP library by version, or ``hf_xet``.

    ``hf_xet`` raises plain OSError and RuntimeError, which are known by where they came from.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def known(each: BaseException) -> bool:
        http = type(each).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}
        return http or isinstance(each, HfHubHTTPError | OfflineModeIsEnabled)

    raised_in = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(exc.__traceback__)}
    inside = any(name.startswith("huggingface_hub") for name in raised_in)
    return any(known(each) for each in chain(exc)) or (inside and isinstance(exc, OSError | RuntimeError))


def is_offline(exc: Exception) -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbade it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(each, OfflineModeIsEnabled) for each in chain(exc))


def response_of(exc: BaseException) -> Any:
    """The Hub's answer behind an exception, or None where there was none."""
    answers = (getattr(each, "response", None) for each in chain(exc))
    return next((answer for answer in answers if answer is not None), None)


def said_by(exc: BaseException) -> str:
    """The Hub's own words."""
    words = (getattr(each, "server_message", None) for each in chain(exc))
    return " ".join(str(next((said for said in words if said), exc)).split())[:300]


def told(events: Generator[_Event, None, _T], on_event: Callable[[_Event], None]) -> _T:
    """Run ``events`` to its end, passing each on; returns what it returns."""
    try:
        while True:
            on_event(next(events))
    except StopIteration as stop:
        found: _T = stop.value
        return found
    finally:
        # Where passing one on fails, what is under way ends now rather than with the generator.
        events.close()
