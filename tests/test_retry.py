"""How long the Hub asks to be left alone, in every way it may say so."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from mlxq.retry import Waiting, named_wait_s, waiting_for


class LimitedError(Exception):
    """A refusal with an answer behind it."""

    def __init__(self, status: int = 429, **headers: str) -> None:
        super().__init__("limited")
        self.response = SimpleNamespace(
            status_code=status, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"RateLimit": '"api";r=0;t=280'}, 280),
        ({"RateLimit": '"api"; t=55; r=0'}, 55),
        ({"RateLimit": '"pages";r=12;t=299, "api";r=0;t=31'}, 31),
        ({"RateLimit": "limit=500, remaining=0, reset=120"}, 120),
        ({"RateLimit_Reset": "77"}, 77),
        ({"Retry_After": "3", "RateLimit": '"api";r=0;t=280'}, 3),
        ({"Retry_After": "soon", "RateLimit": '"api";r=0;t=280'}, 280),
        ({"RateLimit": '"api";r=5;t=280'}, None),
        ({"RateLimit": "nonsense; t=; r"}, None),
        ({"Retry_After": "-5"}, None),
        ({}, None),
    ],
)
def test_the_hub_names_its_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert named_wait_s(LimitedError(**headers)) == seconds
    assert named_wait_s(LimitedError(503, **headers)) is None


def test_a_date_to_come_back_at() -> None:
    at = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)
    assert named_wait_s(LimitedError(Retry_After=at)) == pytest.approx(90, abs=5)
    past = format_datetime(datetime.now(timezone.utc) - timedelta(days=90), usegmt=True)
    assert named_wait_s(LimitedError(Retry_After=past)) == 0


def test_a_wait_is_what_was_named() -> None:
    said = "the Hub limits how often it may be asked"
    assert waiting_for(LimitedError(RateLimit='"api";r=0;t=280'), 1) == Waiting(280, said)
    assert waiting_for(LimitedError(), 2) == Waiting(30, said)
    assert waiting_for(LimitedError(Retry_After="86400"), 1) is None
