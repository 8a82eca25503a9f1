"""``mlxq convert MODEL``: the same line as ``quantize``, with a recipe that only casts."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from mlxq.cli.options import DryRun, Force, Generate, Json, LowDisk, Output, Quiet, TrustRemoteCode


class Dtype(str, Enum):
    """Dtypes weights can be written in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def command(
    model: Annotated[str, typer.Argument(help="Folder, Hub id[@revision], .gguf file, or 'sample'.")],
    output: Output = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype to write; default: the source's.", show_default=False)
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Write quantized modules as plain numbers.")] = False,
    keep_quantization: Annotated[
        bool,
        typer.Option("--keep-quantization", help="Carry GGUF blocks over bit for bit where MLX has the same format."),
    ] = False,
    dry_run: DryRun = False,
    low_disk: LowDisk = False,
    force: Force = False,
    generate: Generate = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model to MLX without quantizing it.

    Example: mlxq convert model.gguf -o ./model-mlx --keep-quantization
    """
    from mlxq.cli.fetching import find_model
    from mlxq.cli.writing import show_plan, write_model
    from mlxq.errors import BadInputError
    from mlxq.machine.backend import start_mlx
    from mlxq.recipe.load import recipe_from_dict
    from mlxq.show.console import console

    console.use(quiet=quiet, as_json=as_json)
    if dequantize and keep_quantization:
        raise BadInputError("--dequantize and --keep-quantization exclude each other")
    start_mlx()
    from mlxq.pipeline import default_output, prepare
    from mlxq.planning.plan import Stored

    recipe = recipe_from_dict({"dtype": dtype.value} if dtype else {}, "mlx")
    asked = {Stored.DEQUANTIZE: dequantize, Stored.CARRY_OVER: keep_quantization}
    stored = next((each for each, wanted in asked.items() if wanted), Stored.AS_IS)
    out = output or default_output(recipe, model)
    if not dry_run and out.exists() and not force:
        raise BadInputError(f"{out} already exists", "Choose another -o, or replace it with --force.")
    plan = prepare(recipe, find_model(model, trusted=trust_remote_code), stored)
    if dry_run:
        show_plan(plan, out=out, why=None, low_disk=low_disk)
    else:
        write_model(plan, out, force=force, generate=generate, low_disk=low_disk)
