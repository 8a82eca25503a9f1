"""The house rules that imports can break: they point one way, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlxq"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The rooms, from the ground up. A room may import from itself and from those before it; hints for types count too.
# The first floor is the modules beside the rooms.
ROOMS = (
    "",
    "machine",
    "methods",
    "metrics",
    "recipe",
    "sources",
    "architecture",
    "running",
    "planning",
    "calibration",
    "budget",
    "writing",
    "publish",
    "pipeline",
    "comparison",
    "api",
    "verbs",
    "show",
    "cli",
)
# Modules of the top level that are no ground: the line itself, and the door.
# The package itself lends its verbs to whoever imports it.
NOT_GROUND = {"": "cli", "pipeline": "pipeline", "api": "api", "verbs": "verbs", "__main__": "cli"}
# Imports from above that are still there, importer -> imported. It only ever gets shorter.
FROM_ABOVE: set[tuple[str, str]] = set()
# Modules that still import each other, each circle sorted. It only ever gets shorter.
CIRCLES: set[tuple[str, ...]] = set()
HEAVY = {"mlx", "mlx_lm", "numpy", "huggingface_hub", "transformers", "gguf", "matplotlib", "jinja2", "psutil"}


def name_of(module: Path) -> str:
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(name: str) -> str:
    """The room of a module, ``""`` for the ground."""
    first = name.partition(".")[0]
    if first in NOT_GROUND:
        return NOT_GROUND[first]
    return first if (PACKAGE / first).is_dir() else ""


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_imported_by(module: Path) -> set[str]:
    """Modules of the package that ``module`` imports anywhere, by their names inside the package."""
    found = set()
    for name in imported(ast.parse(module.read_text(encoding="utf-8"))):
        inner = name.removeprefix("mlxq.")
        if name.startswith("mlxq.") and PACKAGE.joinpath(*inner.split(".")).with_suffix(".py").is_file():
            found.add(inner)
    return found - {name_of(module)}


GRAPH = {name_of(module): modules_imported_by(module) for module in MODULES}


def from_above(graph: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Imports (importer, imported) of a room that comes later."""
    floor = {room: number for number, room in enumerate(ROOMS)}
    return {
        (name, other)
        for name, others in graph.items()
        for other in others
        if floor[room_of(other)] > floor[room_of(name)]
    }


def circles(graph: Mapping[str, set[str]]) -> set[tuple[str, ...]]:
    """Sets of modules, sorted, each of which can be reached from all the others of its set."""
    reached = {name: reachable(graph, name) for name in graph}
    return {
        tuple(sorted({name, *(other for other in reached[name] if name in reached[other])}))
        for name in graph
        if name in reached[name]
    }


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def test_every_room_has_its_place() -> None:
    assert {room_of(name) for name in GRAPH} == set(ROOMS)


def test_the_design_lists_the_rooms_in_their_order_and_only_files_that_are_there() -> None:
    design = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    listing = design.partition("\nmlxq/\n")[2].partition("\nrecipes/")[0]
    rooms = []
    for line in listing.splitlines():
        first = line.split()[0]
        room = first.rstrip("/") if first.endswith("/") else ""
        if line.startswith("  ") and (PACKAGE / first).exists():
            rooms.append(first.rstrip("/").removesuffix(".py"))
        for file in re.findall(r"[\w*]+\.(?:py|yaml)\b", line):
            assert any((PACKAGE / room).glob(file)), f"{room}/{file}"
    assert [room for room in rooms if room in ROOMS] == [room for room in ROOMS if room]


def test_imports_point_one_way_room_by_room() -> None:
    assert from_above(GRAPH) == FROM_ABOVE


def test_no_modules_import_each_other() -> None:
    assert circles(GRAPH) == CIRCLES


def test_an_import_from_above_and_a_circle_are_seen() -> None:
    graph = {"tensors": {"sources.hub"}, "sources.hub": {"sources.base"}, "sources.base": {"sources.hub", "tensors"}}
    assert from_above(graph) == {("tensors", "sources.hub")}
    assert circles(graph) == {("sources.base", "sources.hub", "tensors")}
    assert circles({"tensors": set(), "fold": {"tensors"}}) == set()


def test_mlx_lm_is_imported_in_one_module() -> None:
    importers = {
        name_of(module)
        for module in MODULES
        if any(name.partition(".")[0] == "mlx_lm" for name in imported(ast.parse(module.read_text(encoding="utf-8"))))
        or '"mlx_lm' in module.read_text(encoding="utf-8")
    }
    assert importers == {"upstream"}


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
