"""What ``pip install --report REPORT --log LOG`` fetched, in MB; fails where it built anything but this project."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

OURS = "mlxq"
UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6}


def built(report: str, log: str) -> set[str]:
    """Names of what was not installed from a ready wheel, and of all wheels that were made, build tools' included."""
    found = set(re.findall(r"Building wheel for (\S+)", log))
    for item in json.loads(report)["install"]:
        if not item["download_info"]["url"].endswith(".whl"):
            found.add(item["metadata"]["name"])
    return found - {OURS}


def fetched_bytes(log: str) -> float:
    """Bytes of the archives that pip downloaded, or read from an index on this disk."""
    sizes = re.findall(r"\bDownloading \S+ \(([\d.]+) (bytes|kB|MB)\)", log)
    local = re.findall(r"\bProcessing (/\S+\.whl)", log)
    return sum(float(size) * UNITS[unit] for size, unit in sizes) + sum(Path(file).stat().st_size for file in local)


def main() -> None:
    """Print the sum, or end with what was built."""
    report, log = (Path(file).read_text(encoding="utf-8") for file in sys.argv[1:])
    if others := built(report, log):
        raise SystemExit(f"pip built what a machine without a compiler cannot count on: {', '.join(sorted(others))}")
    print(f"fetched {fetched_bytes(log) / 1e6:.0f} MB; built nothing but {OURS}")


if __name__ == "__main__":
    main()
