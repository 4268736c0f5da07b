"""Who may import whom: arrows go one way. And one name for every op in every room."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room imports only from lower floors, or from its own. The ground floor is open to all.
GROUND = {"errors", "handles", "installed", "shapes", "seeds", "files", "system", "terminal"}
GROUND |= {"plain_yaml", "warm"}
FLOORS = (
    GROUND,
    {"reference", "kernels", "_C", "data", "tracking"},
    {"ops"},
    {"clip", "prompts", "features"},
    {"methods"},
    {"released"},
    {"config", "presets"},
    {"training"},
    {"federation"},
    {"report", "flower", "dropin", "testing", "templates", "trained"},
    {"serving"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# Rooms of one floor that may use each other; anywhere else only a room's own files may.
NEIGHBOURS = (GROUND, {"clip", "prompts", "features"}, {"config", "presets"})
# What a room may not name although it lies below: what a client does knows no released code.
NEVER = {"training": {"released"}}
# What only some rooms may name, whatever their floor.
ONLY_IN = {
    "triton": {"kernels"},
    "fastfpl.kernels": {"kernels", "ops"},
    "fastfpl._C": {"ops"},
    "open_clip": {"clip"},
    "torchvision": {"clip", "data"},
    "sklearn": {"data"},
    "scipy": {"data"},
    "flwr": {"flower"},
    "fastapi": {"serving"},
    "uvicorn": {"serving"},
}
LATE = {
    "matplotlib",
    "torchvision",
    "open_clip",
    "sklearn",
    "scipy",
    "transformers",
    "triton",
    "flwr",
}
# Files of ops/, kernels/ and csrc/ that are no op. What an op is too long for is <op>_<part>.
NO_OP = {"__init__", "faces", "launch", "memory", "native", "precision", "rounding", "tower"}
NO_OP |= {"bindings", "functional", "launching", "lifetime", "operators"}


def imports(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Every import: line, module, and whether it runs when the file is imported."""

    def walk(node: ast.AST, now: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or ""), now
            elif node.module in ("fastfpl", "fastfpl.ops", "fastfpl.reference"):
                yield from (
                    (node.lineno, f"{node.module}.{alias.name}", now) for alias in node.names
                )
            else:
                yield node.lineno, str(node.module), now
        elif isinstance(node, ast.Call):
            named = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if named == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value), now
        typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        inner = now and not typing and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inner)

    yield from walk(tree, True)


def violations(root: Path) -> list[str]:
    """Return a sentence for every import that the house does not allow."""
    found: list[str] = []
    files = [(p, p.relative_to(root / "fastfpl").parts) for p in root.glob("fastfpl/**/*.py")]
    files += [(p, p.relative_to(root).parts) for p in root.glob("kernels/**/*.py")]
    for path, parts in sorted(files):
        room = parts[0].removesuffix(".py")
        if room == "__init__":  # the front door names every room, lazily
            continue
        if room not in FLOOR:
            found.append(f"{path.relative_to(root)}: {room} has no floor in {Path(__file__).name}")
            continue
        for line, module, now in imports(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(root)}:{line}:"
            top, *rest = module.split(".")
            if not top:
                found.append(f"{where} imports must be absolute; got {module}")
                continue
            for name, rooms in ONLY_IN.items():
                if (module == name or module.startswith(name + ".")) and room not in rooms:
                    found.append(f"{where} {name} is for {', '.join(sorted(rooms))}; got {room}")
            launcher = top == "triton" and room == "kernels" and parts[-1] != "__init__.py"
            if top in LATE and now and not launcher:
                found.append(f"{where} {top} must be imported where it is used, not with the file")
            if top == "kernels":
                found.append(f"{where} kernels is imported as fastfpl.kernels")
            if top != "fastfpl":
                continue
            if not rest:
                found.append(f"{where} import the room, not fastfpl: it hides the direction")
                continue
            if rest[0].startswith("__"):
                continue
            if rest[0] not in FLOOR:
                found.append(f"{where} {module} must be imported from the room it lives in")
                continue
            beside = any({room, rest[0]} <= rooms for rooms in NEIGHBOURS)
            if room == "data" and rest[0] not in ("data", "errors", "installed", "seeds", "files"):
                found.append(f"{where} data knows no model; got {module}")
            elif room == "kernels" and rest[0] != "kernels":
                found.append(f"{where} kernels know torch and triton only; got {module}")
            elif rest[0] in NEVER.get(room, ()):
                found.append(f"{where} {room} knows no {rest[0]}; got {module}")
            elif rest[0] != room and not beside and FLOOR[rest[0]] >= FLOOR[room]:
                found.append(f"{where} {room} must not import {rest[0]}: arrows go down only")
    return found


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its name."""
    files = [(p, p.relative_to(root).with_suffix("").parts) for p in root.glob("fastfpl/**/*.py")]
    files += [
        (p, ("fastfpl", *p.relative_to(root).with_suffix("").parts))
        for p in root.glob("kernels/**/*.py")
    ]
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in files}


def circles(root: Path) -> list[list[str]]:
    """Return every circle of modules that import each other, at whatever time, also for types."""
    known = modules(root)
    known.pop("fastfpl", None)  # the front door names every room, lazily
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # a name is a module of a package, or stands in the module itself
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                inside = whole & known.keys()
                named |= inside | ({str(node.module)} if whole - inside else set())
        graph[name] = named & known.keys()
    # who has nobody left to wait for goes, as often as anybody does
    while gone := {name for name, others in graph.items() if not others}:
        graph = {name: others - gone for name, others in graph.items() if name not in gone}
    found = []
    while graph:
        path = [min(graph)]
        while path.count(path[-1]) == 1:
            path.append(min(graph[path[-1]]))
        found.append(path[path.index(path[-1]) :])
        graph = {n: others - set(path) for n, others in graph.items() if n not in path}
        while gone := {name for name, others in graph.items() if not others}:
            graph = {name: others - gone for name, others in graph.items() if name not in gone}
    return found


def missing_doors(root: Path) -> list[str]:
    """Return a sentence for every op that lacks its file in a room, or a file without its op."""
    files = {p.stem for p in root.glob("fastfpl/ops/*.py")} - NO_OP
    ops = {file for file in files if not any(file.startswith(f"{op}_") for op in files)}
    rooms = ("fastfpl/reference/{}.py", "tests/test_{}.py", "bench/bench_{}.py")
    doors = [door.format(op) for op in sorted(ops) for door in rooms]
    found = [f"{door} is missing" for door in doors if not (root / door).exists()]
    others = [*root.glob("csrc/*.cpp"), *root.glob("csrc/cuda/*.cu"), *root.glob("kernels/*.py")]
    for path in sorted(others):
        part = any(path.stem.startswith(f"{op}_") for op in ops)
        if path.stem not in ops | NO_OP and not part:
            found.append(
                f"{path.relative_to(root)} has no op: fastfpl/ops/{path.stem}.py is missing"
            )
    return found


def test_imports_go_down_only():
    assert violations(ROOT) == []


def test_no_module_leads_back_to_itself():
    assert circles(ROOT) == []


def test_a_planted_circle_is_found(tmp_path):
    for name, text in {
        "fastfpl/__init__.py": "from fastfpl.ops import a",
        "fastfpl/ops/__init__.py": "from fastfpl.ops.a import f",
        "fastfpl/ops/a.py": "import fastfpl.ops.b\nfrom fastfpl import __version__",
        "fastfpl/ops/b.py": "from fastfpl.ops.c import g",
        "fastfpl/ops/c.py": "",
        "kernels/a.py": "from fastfpl.kernels import b",
        "kernels/b.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles(tmp_path) == []
    (tmp_path / "kernels/b.py").write_text("def f():\n    import fastfpl.kernels.a")
    assert circles(tmp_path) == [["fastfpl.kernels.a", "fastfpl.kernels.b", "fastfpl.kernels.a"]]
    (tmp_path / "kernels/b.py").write_text("")
    (tmp_path / "fastfpl/ops/c.py").write_text("if TYPE_CHECKING:\n    from fastfpl.ops import f")
    package = ["fastfpl.ops", "fastfpl.ops.a", "fastfpl.ops.b", "fastfpl.ops.c", "fastfpl.ops"]
    assert circles(tmp_path) == [package]


def test_every_op_has_its_doors():
    assert missing_doors(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        (
            "fastfpl/ops/x.py",
            "from fastfpl.methods import y",
            "ops must not import methods: arrows",
        ),
        ("fastfpl/methods/x.py", "def f():\n    import fastfpl.cli", "methods must not import cli"),
        ("fastfpl/report/x.py", "from fastfpl.flower import y", "report must not import flower"),
        ("fastfpl/errors.py", "import fastfpl.ops.gate", "errors must not import ops"),
        (
            "fastfpl/federation/x.py",
            "from fastfpl.report import y",
            "federation must not import rep",
        ),
        (
            "fastfpl/training/x.py",
            "from fastfpl.federation import y",
            "training must not import federation",
        ),
        ("fastfpl/training/x.py", "from fastfpl.released import y", "training knows no released"),
        ("fastfpl/config.py", "from fastfpl.training import y", "config must not import training"),
        (
            "fastfpl/data/x.py",
            "from fastfpl.shapes import y",
            "data knows no model; got fastfpl.shap",
        ),
        (
            "fastfpl/federation/x.py",
            "def f():\n    import triton",
            "triton is for kernels; got fed",
        ),
        (
            "fastfpl/ops/x.py",
            "import fastfpl.kernels.y\ndef f():\n    import triton.z",
            "triton is for",
        ),
        (
            "fastfpl/clip/x.py",
            "def f():\n    from fastfpl import _C",
            "fastfpl._C is for ops; got cl",
        ),
        ("fastfpl/clip/x.py", "import importlib as i\ni.import_module('fastfpl._C')", "is for ops"),
        ("fastfpl/ops/x.py", "def f():\n    import open_clip", "open_clip is for clip; got ops"),
        (
            "fastfpl/ops/x.py",
            "def f():\n    import torchvision.io",
            "torchvision is for clip, data",
        ),
        ("fastfpl/clip/x.py", "def f():\n    import sklearn", "sklearn is for data; got clip"),
        ("fastfpl/clip/x.py", "try:\n    import open_clip\nfinally:\n    pass", "where it is used"),
        (
            "fastfpl/clip/x.py",
            "class A:\n    import transformers",
            "where it is used, not with the",
        ),
        ("kernels/__init__.py", "import triton", "triton must be imported where it is used"),
        (
            "kernels/x.py",
            "import triton\nfrom fastfpl.errors import y",
            "know torch and triton only",
        ),
        ("fastfpl/clip/x.py", "from . import y", "imports must be absolute; got ."),
        ("fastfpl/clip/x.py", "from fastfpl import load_clip", "from the room it lives in"),
        ("fastfpl/clip/x.py", "import fastfpl", "import the room, not fastfpl"),
        ("fastfpl/ops/x.py", "import kernels.y", "kernels is imported as fastfpl.kernels"),
        ("fastfpl/attic.py", "", "attic has no floor"),
    ],
)
def test_a_planted_import_is_found(tmp_path, file, text, sentence):
    good = {
        "fastfpl/__init__.py": "from fastfpl.cli import main",
        "fastfpl/cli/x.py": "import fastfpl.report.page\nfrom fastfpl.errors import near",
        "fastfpl/ops/y.py": "from fastfpl.reference import y\ndef f():\n    import fastfpl._C",
        "fastfpl/prompts.py": "from fastfpl.clip import z\nfrom fastfpl import __version__",
        "fastfpl/clip/y.py": "import torch\ndef f():\n    import open_clip, torchvision",
        "fastfpl/report/y.py": "if TYPE_CHECKING:\n    import matplotlib",
        "kernels/y.py": "import triton.language as tl",
    }
    for name, content in good.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert violations(tmp_path) == []
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(file)
    assert sentence in found[0]


def test_a_missing_door_is_found(tmp_path):
    for name in (
        "fastfpl/ops/a.py",
        "fastfpl/ops/a_part.py",
        "fastfpl/ops/faces.py",
        "fastfpl/reference/a.py",
        "kernels/a_other.py",
        "csrc/b.cpp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert missing_doors(tmp_path) == [
        "tests/test_a.py is missing",
        "bench/bench_a.py is missing",
        "csrc/b.cpp has no op: fastfpl/ops/b.py is missing",
    ]


def test_importing_the_package_starts_nothing():
    heavy = {"torch", "triton", "open_clip", "torchvision", "matplotlib", "flwr", "numpy"}
    code = f"import sys, fastfpl, fastfpl.ops; print(sorted({heavy!r} & set(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
