"""The model card: front matter the Hub reads, and a section that says what was done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mlxq.plan import Plan

BEGIN, END = "<!-- mlxq begin -->", "<!-- mlxq end -->"


def card_text(plan: Plan, name: str) -> str:
    """The README.md of a model just quantized, as Markdown with YAML front matter."""
    import yaml

    formats = Counter(str(d.format) if d.format else d.dtype for d in plan.decisions)
    made = ", ".join(f"{count} x {fmt}" for fmt, count in formats.most_common())
    origin = plan.source.base_model
    lines = [
        "---",
        yaml.safe_dump(front_matter(plan), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        BEGIN,
        (f"[{origin}](https://huggingface.co/{origin})" if origin else f"`{Path(plan.source.name).name}`")
        + f" for [MLX](https://github.com/ml-explore/mlx), {plan.bits_per_weight:.2f} bits per weight,"
        f" {plan.file_bytes / 1e9:.2f} GB. Modules: {made}.",
        "",
        "```bash",
        "pip install mlx-lm",
        f'mlx_lm.generate --model {name} --prompt "Hello"',
        "```",
        "",
        "<details><summary>Recipe</summary>",
        "",
        "```yaml",
        plan.recipe.text.rstrip(),
        "```",
        "",
        "</details>",
        END,
        "",
    ]
    return "\n".join(lines)


def front_matter(plan: Plan) -> dict[str, Any]:
    """Front matter: the source card's licence, languages and tags, and what marks an MLX quantization."""
    import yaml

    folder = plan.source.weights_folder
    original: dict[str, Any] = {}
    if folder is not None and (folder / "README.md").is_file():
        parts = (folder / "README.md").read_text(encoding="utf-8", errors="replace").split("---\n", 2)
        if len(parts) == 3 and not parts[0].strip():
            try:
                loaded = yaml.safe_load(parts[1])
            except yaml.YAMLError:
                loaded = None
            original = loaded if isinstance(loaded, dict) else {}
    kept: dict[str, Any] = {
        k: original[k] for k in ("license", "license_name", "license_link", "language") if k in original
    }
    tags = [t for t in original.get("tags") or [] if isinstance(t, str) and t not in {"mlx", "gguf"}]
    matter: dict[str, Any] = {
        "library_name": "mlx",
        "pipeline_tag": original.get("pipeline_tag", "text-generation"),
        **kept,
        "tags": ["mlx", *tags],
    }
    if plan.source.base_model:
        matter["base_model"] = plan.source.base_model
        matter["base_model_relation"] = "quantized"
    return matter
