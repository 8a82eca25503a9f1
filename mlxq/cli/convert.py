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
    from mlxq import api
    from mlxq.cli.fetching import find_model
    from mlxq.cli.writing import show_plan, write_model
    from mlxq.machine.backend import start_mlx
    from mlxq.show.console import console

    console.use(quiet=quiet, as_json=as_json)
    stored = api.stored_for_convert(dequantize=dequantize, keep_quantization=keep_quantization)
    recipe = api.convert_recipe(dtype.value if dtype else None)
    start_mlx()
    out = api.output_folder(output, recipe, model, free=not (dry_run or force))
    plan = api.planned(recipe, find_model(model, trusted=trust_remote_code), stored)
    if dry_run:
        show_plan(plan, out=out, why=None, low_disk=low_disk)
    else:
        write_model(plan, out, force=force, generate=generate, low_disk=low_disk)
