"""The library imports neither Ray nor a web framework, and reading a recipe loads no model code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"ray", "ray_jobs", "serve", "fastapi", "starlette", "flask"}


def test_the_library_stands_without_its_doors() -> None:
    found = []
    for file in (ROOT / "magicid").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            found += [f"{file.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in FORBIDDEN]
    assert found == []


def test_a_recipe_is_read_without_model_code() -> None:
    script = (
        "import sys; from magicid import recipe, schema, run; [recipe.load(n) for n in recipe.shipped()];"
        "heavy = {'torch', 'ray', 'diffusers', 'insightface'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
