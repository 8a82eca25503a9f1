"""``mlxq env``."""

from __future__ import annotations

from mlxq.cli.options import Json


def command(as_json: Json = False) -> None:
    """Show what this machine is.

    Versions, device, memory, BLAS, and whether there is a Hub login (never the token).

    On a Linux CPU the BLAS is the first that is proved to work there, in a process of its own; the proof is remembered
    in ~/.cache/mlxq (MLXQ_CACHE). Shown are the kernels it chose, what a product in fp32 reached, and why others were
    passed over. MLXQ_BLAS=PATH names another library, MLXQ_BLAS=none keeps the slow one that MLX carries.
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
