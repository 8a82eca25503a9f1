"""Recipes from files and options: found, extended, overridden; ``check`` says whether the result is one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mlxq.errors import RecipeError
from mlxq.recipe.check import build
from mlxq.recipe.draft import Draft, Fault, Origin, draft_of, option_origin, suggestion
from mlxq.recipe.model import Recipe
from mlxq.recipe.yaml import DEEPEST, Document, heading, parse_value, read_document

_LONGEST_CHAIN = 20  # recipes that extend each other


def load_recipe(ref: str | Path, sets: Sequence[str] = (), budget: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or the shipped recipe of that name, with what it extends and what options say applied.

    ``sets`` are ``PATH=VALUE`` strings (``default.bits=3``, ``rules.0.keep=true``), each value read as YAML,
    applied after ``extends``; ``budget`` is what ``--bpw`` or ``--size`` gave, such as ``{"bpw": 4.25}``. Raises
    RecipeError with every fault of the recipe at once.
    """
    path = _find(ref, Path())
    if isinstance(path, Fault):
        raise RecipeError((path,))
    label = path.name if _is_shipped(path) else str(ref)
    document = read_document(path)
    draft = _extended(_own_draft(document, label, rank=0), path)
    _override(draft, sets, budget)
    recipe = build(draft, path.stem)
    return replace(recipe, path=str(path), text=document.text, description=heading(document.text))


def recipe_from_program(data: Mapping[str, Any], name: str) -> Recipe:
    """The recipe that a program states as data, as if a file in the working folder held it: it may extend others.

    Raises RecipeError with every fault at once.
    """
    own = draft_of(data, name)
    rules = own.data.get("rules")
    own.own_rules = len(rules) if isinstance(rules, list) else 0
    recipe = build(_extended(own, Path(name)), name)
    return replace(recipe, text=yaml.safe_dump(dict(data), sort_keys=False))


def recipe_from_dict(data: Mapping[str, Any], name: str) -> Recipe:
    """The recipe that ``Recipe.resolved`` recorded. Raises RecipeError with every fault at once.

    Its rules count as inherited: what they came to was settled when they were recorded.
    """
    draft = draft_of({key: value for key, value in data.items() if key != "extends"}, name)
    if "extends" in data:
        draft.faults.append(Fault(Origin(name, at=("extends",)), "a resolved recipe extends nothing"))
    recipe = build(draft, name)
    return replace(recipe, text=yaml.safe_dump(draft.data, sort_keys=False))


def budget_recipe(budget: Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
    """The recipe of a budget alone, such as ``{"bpw": 4.25}``, with ``sets`` applied; named after the budget.

    Raises RecipeError with every fault at once.
    """
    name = str(budget["size"]) if "size" in budget else f"{budget['bpw']:g}bpw"
    draft = draft_of({}, name)
    _override(draft, sets, budget)
    return replace(build(draft, name), text=yaml.safe_dump(draft.data, sort_keys=False))


def names_recipe(text: str) -> bool:
    """Does an argument name a recipe? A YAML file, or a shipped recipe's name where no such path exists."""
    if text.endswith((".yaml", ".yml")):
        return True
    # os.path: a name too long for the file system, or with a NUL in it, is one that does not exist.
    return text in _shipped() and not os.path.exists(text)


def shipped_recipes() -> tuple[Recipe, ...]:
    """The recipes that come with mlxq, by name."""
    return tuple(load_recipe(name) for name in _shipped())


def _shipped_folder() -> Path:
    """In the package where it is installed, beside it in a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _shipped() -> dict[str, Path]:
    return {file.stem: file for file in sorted(_shipped_folder().glob("*.yaml"))}


def _is_shipped(path: Path) -> bool:
    return path.parent == _shipped_folder()


def _find(ref: str | Path, folder: Path, origin: Origin | None = None) -> Path | Fault:
    """The file of a shipped recipe's name or of a path relative to ``folder``; else what is wrong with ``ref``."""
    origin = origin or Origin("")
    shipped = _shipped()
    if isinstance(ref, str) and ref in shipped:
        return shipped[ref]
    if not str(ref).strip():
        return Fault(origin, "the recipe's name is empty")
    path = folder / Path(ref)
    if os.path.exists(path):
        return path
    if path.suffix in (".yaml", ".yml") or len(Path(ref).parts) > 1:
        return Fault(origin, f"no such recipe file: {path}")
    near = suggestion(str(ref), shipped) or f"; shipped ones are {', '.join(shipped)}"
    return Fault(origin, f"no recipe is called {str(ref)!r}{near}")


def _extended(own: Draft, path: Path) -> Draft:
    """A draft, which stands at ``path``, on top of all that it extends."""
    drafts = [own]
    chain = [path.resolve()]
    while (ref := _extends(drafts[-1])) is not None:
        draft, origin = drafts[-1], drafts[-1].origin(("extends",))
        parent = _find(ref, path.parent, origin)
        if isinstance(parent, Fault):
            draft.faults.append(parent)
            break
        resolved = parent.resolve()
        if resolved in chain:
            names = " -> ".join(p.name for p in (*chain[chain.index(resolved) :], parent))
            draft.faults.append(Fault(origin, f"recipes extend each other in a circle: {names}"))
            break
        if len(chain) == _LONGEST_CHAIN:
            draft.faults.append(Fault(origin, f"more than {_LONGEST_CHAIN} recipes extend each other"))
            break
        chain.append(resolved)
        path = parent
        parent_label = parent.name if _is_shipped(parent) else str(parent)
        drafts.append(_own_draft(read_document(parent), parent_label, rank=len(drafts)))
    merged = drafts.pop()
    while drafts:
        merged = drafts.pop().over(merged)
    return merged


def _own_draft(document: Document, label: str, rank: int) -> Draft:
    """What the document itself says."""
    origins = {at: Origin(label, line, at, rank) for at, line in document.lines.items()}
    origins[()] = Origin(label, rank=rank)
    faults = [Fault(Origin(label, f.line, f.path, rank), f.message) for f in document.faults]
    rules = document.data.get("rules")
    return Draft(dict(document.data), origins, len(rules) if isinstance(rules, list) else 0, faults)


def _extends(draft: Draft) -> str | None:
    """Takes out what the draft extends; None where nothing, or something that the schema will refuse."""
    ref = draft.data.get("extends")
    if not isinstance(ref, str) or not ref:
        return None
    del draft.data["extends"]
    return ref


def _override(draft: Draft, sets: Sequence[str], budget: Mapping[str, Any] | None) -> None:
    """Apply options. What they set is checked with everything else afterwards."""
    for text in sets:
        _set(draft, text)
    if budget is not None:
        option = " ".join(
            f"--{key} {value:g}" if isinstance(value, float) else f"--{key} {value}" for key, value in budget.items()
        )
        draft.put(["budget"], dict(budget), option_origin(option, says_all=True))


def _set(draft: Draft, text: str) -> None:
    """Apply one ``PATH=VALUE``."""
    dotted, equals, value_text = text.partition("=")
    origin = option_origin(f"--set {text}")
    keys = re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".")
    fault = None
    value = None
    if not equals or not all(keys):
        fault = "write it as PATH=VALUE, such as default.bits=3 or rules.0.keep=true"
    elif keys[0] == "extends":
        fault = "extends can't be set; name the other recipe instead of this one"
    elif len(keys) > DEEPEST:
        fault = f"values are nested more than {DEEPEST} deep"
    else:
        try:
            value = parse_value(value_text)
        except ValueError as error:
            fault = f"the value {error}"
    if fault:
        draft.faults.append(Fault(origin, fault))
    else:
        draft.put(keys, value, origin)
