"""``mlxq env``."""

from __future__ import annotations

from mlxq.cli.options import Json


def command(as_json: Json = False) -> None:
    """Show what this machine is.

    Versions, device, memory, BLAS, and whether there is a Hub login (never the token).
    """
    from dataclasses import asdict

    from mlxq.machine.runtime import environment
    from mlxq.show.console import console
    from mlxq.show.tables import environment_table

    console.use(as_json=as_json)
    found = environment()
    if console.as_json:
        console.json({"schema": "mlxq.env", "schema_version": 1, **asdict(found)})
    else:
        console.show(environment_table(found))
