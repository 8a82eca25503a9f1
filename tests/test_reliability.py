"""Short versions of the campaigns in tests/reliability/: the same code, a few faults each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import power_loss


def test_power_loss_leaves_nothing_half_and_the_same_command_goes_on(tmp_path: Path) -> None:
    assert power_loss.in_a_model(16, seed=1, work=tmp_path) == []


@pytest.mark.parametrize(
    ("campaign", "summary"),
    [
        ("kills.campaign(4, 1, ('quantize', 'upload'))[1]", "[]"),
        ("disk_full.campaign(4)[2]", "[]"),
        ("at_once.campaign(2, 1)[1]", "[]"),
    ],
)
def test_faults_leave_nothing_half_and_the_same_command_goes_on(campaign: str, summary: str) -> None:
    """In a process of its own: forks must come before MLX has started its threads."""
    module = campaign.partition(".")[0]
    code = f"from tests.reliability import {module}; print({campaign})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, summary), ran.stderr
