"""What reaches a terminal: text from files loses what a terminal would obey, whichever way it is printed."""

from __future__ import annotations

import json

import pytest
from rich.table import Table

from mlxq.errors import BadInputError
from mlxq.show.console import Sink

# A colour, a title, a cursor movement as C1, a backspace, an override of the reading direction.
HOSTILE = "a\x1b[31mb\x1b]0;title\x07c\x9b2Jd\x08e\u202etxt.exe"
OBEYED = "\x1b\x07\x9b\x08\u202e"


@pytest.fixture
def sink() -> Sink:
    return Sink()


def printed(capfd: pytest.CaptureFixture[str]) -> str:
    out, err = capfd.readouterr()
    return out + err


def test_nothing_printed_can_drive_the_terminal(sink: Sink, capfd: pytest.CaptureFixture[str]) -> None:
    table = Table("name")
    table.add_row(HOSTILE)
    sink.show(table)
    sink.text(HOSTILE)
    sink.note(HOSTILE)
    sink.warn(HOSTILE)
    sink.error(BadInputError(HOSTILE, HOSTILE))
    said = printed(capfd)
    assert said.count("e" + "txt.exe") == 6
    assert not set(said) & set(OBEYED)


def test_markup_in_a_message_is_text(sink: Sink, capfd: pytest.CaptureFixture[str]) -> None:
    sink.warn("[bold]not bold[/]")
    sink.error(BadInputError("[link=http://x]no link[/link]"))
    assert printed(capfd) == "note: [bold]not bold[/]\nerror: [link=http://x]no link[/link]\n"


def test_json_keeps_its_data_and_obeys_nothing(sink: Sink, capfd: pytest.CaptureFixture[str]) -> None:
    sink.json({"name": HOSTILE, "word": "caf\u00e9"})
    said = printed(capfd)
    assert not set(said) & set(OBEYED)
    assert "caf\u00e9" in said
    assert json.loads(said)["name"] == HOSTILE


def test_quiet_drops_notes_and_keeps_warnings(sink: Sink, capfd: pytest.CaptureFixture[str]) -> None:
    sink.use(quiet=True)
    sink.note("in passing")
    sink.warn("not to be missed")
    assert printed(capfd) == "note: not to be missed\n"
