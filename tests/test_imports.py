# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Which part of the package may import which: from a room only downward, never in a circle, and never a script."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from modeling_deco.hub import _REMOTE_CODE_FILES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_deco"
# Each row may import the rows above it. The model is the flat files, which are also the Hub's remote code.
LEVELS = [
    {"model"},
    {"utils"},
    {"inference"},
    {"relevance"},
    {"conversion", "training"},
    {"worlds"},
    {"integrations", "serving"},
    {"page"},
    {"cli"},
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(path: Path, module: str, with_type_checking: bool = True) -> set[str]:
    """Modules of the package that a file imports, anywhere in it; names of this package are resolved to their file."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found, skipped = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not with_type_checking:
            skipped.update(ast.walk(node))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found.update({name for name in names if name in MODULES} or {base})
            found.update({base} if any(name not in MODULES for name in names) else ())
    return {name for name in found if name.split(".")[0] == "modeling_deco" and name != module}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else "model"


def test_the_top_level_of_the_package_is_the_model_alone():
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {*_REMOTE_CODE_FILES, "__init__.py", "__init__.pyi", "_registration.py", "py.typed"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {*LEVEL_OF, "checkpoints"} - {"model"}
    assert not list((PACKAGE / "checkpoints").rglob("*.py"))


def test_imports_never_run_upward():
    upward = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        if module != "modeling_deco"  # whose names are looked up in their rooms when they are first asked for
        for imported in imports_of(path, module)
        if room_of(imported) != room_of(module) and LEVEL_OF[room_of(imported)] >= LEVEL_OF[room_of(module)]
    ]
    assert upward == []


def test_the_remote_code_imports_nothing_but_its_siblings():
    siblings = {f"modeling_deco.{Path(name).stem}" for name in _REMOTE_CODE_FILES}
    for module in siblings:
        assert imports_of(MODULES[module], module) <= siblings, module


def test_no_file_imports_another_in_a_circle():
    graph = {
        module: imports_of(path, module, with_type_checking=False) - {"modeling_deco"}
        for module, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_nobody_imports_a_script():
    scripts = {
        path.stem
        for folder in ("conversion", "recipes", "benchmarks", "examples")
        for path in ROOT.glob(f"{folder}/**/*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
    for folder in ("modeling_deco", "conversion", "recipes", "benchmarks", "examples"):
        for path in ROOT.glob(f"{folder}/**/*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = {node.module} if isinstance(node, ast.ImportFrom) and not node.level else set()
                names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
                assert not names & scripts, f"{path} imports the script {names & scripts}"
