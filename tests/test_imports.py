"""The house rules that imports can break: they point one way, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlxq"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each floor may import from floors below it and from its own.
FLOORS = (
    ("mlxq", "errors", "tensors", "arrays", "fold", "retry"),
    (
        "metrics.metric",
        "recipe",
        "methods",
        "machine.devices",
        "machine",
    ),
    ("sources", "architecture.inspection", "machine.memory"),
    ("architecture",),
    ("planning",),
    ("writing", "publish.card", "metrics", "calibration", "budget"),
    ("pipeline",),
    ("comparison", "publish"),
    ("show",),
    ("cli", "__main__"),
)
HEAVY = {"mlx", "mlx_lm", "numpy", "huggingface_hub", "transformers", "gguf", "matplotlib", "jinja2", "psutil"}


def name_of(module: Path) -> str:
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor_of(name: str) -> int:
    """The floor of a module: of its longest listed prefix."""
    if name == "":
        return 0
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for floor, names in enumerate(FLOORS):
            if ".".join(parts[:length]) in names:
                return floor
    raise AssertionError(f"mlxq.{name} has no floor: add it to FLOORS")


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_point_one_way(module: Path) -> None:
    own = floor_of(name_of(module))
    for name in imported(ast.parse(module.read_text(encoding="utf-8"))):
        inner = name.removeprefix("mlxq.")
        if name.startswith("mlxq.") and is_module(inner):
            assert floor_of(inner) <= own, f"{name_of(module)} imports {inner} from above"


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_heavy_packages_are_imported_where_they_are_used(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            roots = {name.partition(".")[0] for name in imported(node)}
            assert not roots & HEAVY, f"{name_of(module)} imports {roots & HEAVY} at its top"


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_only_the_shell_prints(module: Path) -> None:
    if name_of(module).split(".")[0] in ("cli", "show"):
        return
    calls = [n for n in ast.walk(ast.parse(module.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_help_needs_nothing_heavy() -> None:
    assert not loaded_by("import mlxq.cli") & (HEAVY | {"pydantic", "yaml"})


def test_inspecting_needs_neither_mlx_nor_transformers(tmp_path: Path) -> None:
    from tests.checkpoints import llama

    llama(tmp_path)
    run = f"sys.argv = ['mlxq', 'inspect', {str(tmp_path)!r}]; import mlxq.cli; mlxq.cli.app(standalone_mode=False)"
    assert not loaded_by(run) & {"mlx", "mlx_lm", "transformers", "numpy"}
