"""The architecture holds: imports go downward, FSDP1's private names stay in one file, the index loads no torch.

Each check is a function of a source tree, so that a second test can show on a small bad tree that it fails.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INDEX = "__init__"  # `fsdp_dp` itself: the public names

# Lowest first. A module imports from its own row and from the rows above it.
ORDER = (
    (
        "config",
        "errors",
        "accountants",
        "accounting",
        "second_opinion",
        "standing",
        "ledger",
        "auditing",
        "tuning",
    ),  # no torch
    (
        "numerics",
        "chacha",
        "noise",
        "draw_guard",
        "exchanges",
        "collating",
        "sampling",
        "records",
        "batch_norm",
        "by_row",
        "planner",
        "side_stream",
        "norm_terms",
        "columns",
        "gradients",
        "vector_gradients",
        "standing_sums",
        "writes",
        "together",
        "patches",
        "leaf_calls",
        "kernels",
        "layers",
        "parts",
        "attention",
        "recurrence",
        "clipping",
        "losses",
        "groups",
        "adaptive_bounds",
        "marks",
        "methods",
        "module_tree",
        "row_layouts",
        "habits",
        "shared_values",
        "graph_identity",
        "probes",
    ),  # pure
    (
        "modes",
        "label_watch",
        "node_taps",
        "compiled",
        "taps",
        "parameter_reads",
        "late_reads",
        "outside_reads",
        "watch",
        "intake",
        "sharding",
        "coverage",
        "loss_recording",
        "independence",
        "optimizer_gate",
    ),
    ("clipped_sum", "guards", "bounds", "releases", "agreement", "keys"),
    ("logical_batch",),
    ("recorder",),
    ("examination",),
    ("engine", "summary"),
    ("wrapper", "averaging", "checkpoint", "export", "verdict"),
    (INDEX,),
    (
        "models",
        "data",
        "training",
        "train",
        "launch",
        "benchmark",
        "check",
        "audit",
        "reporting",
        "report",
        "composition",
        "selection",
        "sweep",
    ),
    ("planning", "plan"),
)
LEVEL = {name: level for level, row in enumerate(ORDER) for name in row}

FSDP1_FILE = "sharding/fsdp1.py"
FSDP1_PRIVATE_NAMES = frozenset(
    "fsdp_modules flat_param _handle _all_handles _flat_param _get_flat_param_offsets _fsdp_wrapped_module _is_root "
    "_inter_node_pg _param_infos _shared_param_infos _shard_param_infos _is_padding_mask _sharded_size".split()
)
# Also names that anyone might give an attribute of their own: no touch when read from `self`.
FSDP1_COMMON_NAMES = frozenset({"_params", "_shapes"})
FSDP1_PRIVATE_MODULES = re.compile(r"torch\.distributed\.fsdp\._(?!fully_shard\b)\w+")


def sources(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Each file below `package`, with its path from there and its syntax tree."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def unit_of(path: str) -> str:
    """The name in ORDER that a file belongs to: `layers/linear.py` is of `layers`."""
    return path.split("/")[0].removesuffix(".py")


def imported_names(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted absolute name) of everything that a file imports, inside functions and `if TYPE_CHECKING` too."""
    package = ("fsdp_dp/" + path).split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def upward_imports(package: Path) -> list[str]:
    """Imports of `package` against ORDER, and files that have no place in it."""
    found = []
    for path, tree in sources(package):
        unit = unit_of(path)
        if unit not in LEVEL:
            found.append(f"{path}: '{unit}' has no place in ORDER; add it")
            continue
        for line, name in imported_names(path, tree):
            if not name.startswith("fsdp_dp"):
                continue
            target = [*name.split("."), INDEX][1]
            target = target if target in LEVEL else INDEX  # a name, not a module: it comes from the index
            if LEVEL[target] > LEVEL[unit]:
                found.append(f"{path}:{line}: '{unit}' imports {name}, which stands above it")
    return found


def touched_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of each attribute read or written that only FSDP1 can have meant, `getattr(x, "name")` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            on_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            if node.attr in FSDP1_PRIVATE_NAMES or (node.attr in FSDP1_COMMON_NAMES and not on_self):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in {
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        }:
            for argument in node.args[1:2]:
                name = argument.value if isinstance(argument, ast.Constant) else None
                if name in FSDP1_PRIVATE_NAMES | FSDP1_COMMON_NAMES:
                    yield node.lineno, str(name)


def fsdp1_private_uses(package: Path) -> list[str]:
    """Places outside FSDP1_FILE that touch FSDP1's private attributes or import its private modules."""
    found = []
    for path, tree in sources(package):
        if path == FSDP1_FILE:
            continue
        found += [f"{path}:{line}: touches {name}" for line, name in touched_names(tree)]
        imports = [(line, name) for line, name in imported_names(path, tree) if FSDP1_PRIVATE_MODULES.match(name)]
        found += [f"{path}:{line}: imports {name}" for line, name in imports]
    return found


def loads_torch(statements: str) -> bool:
    """Whether a fresh interpreter that runs `statements` ends with torch loaded."""
    code = f"{statements}\nimport sys\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1] == "True"


def tree_with(package: Path, path: str, source: str) -> Path:
    """A package that holds one file."""
    (package / path).parent.mkdir(parents=True, exist_ok=True)
    (package / path).write_text(source)
    return package


def test_imports_go_downward() -> None:
    assert upward_imports(ROOT / "fsdp_dp") == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("noise.py", "from fsdp_dp.engine import PrivacyEngine"),
        ("noise.py", "from fsdp_dp import engine"),
        ("noise.py", "from fsdp_dp import PrivacyConfig"),
        ("noise.py", "def f():\n    import fsdp_dp.wrapper"),
        ("noise.py", "from . import engine"),
        ("layers/linear.py", "from ..sharding.base import Unit"),
        ("engine.py", "from fsdp_dp.training.loop import train"),
        ("no_such_row.py", ""),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, path: str, source: str) -> None:
    assert len(upward_imports(tree_with(tmp_path, path, source))) == 1


def test_a_downward_import_is_not_reported(tmp_path: Path) -> None:
    source = "import torch\nfrom fsdp_dp import noise\nfrom fsdp_dp.layers.linear import rule\nfrom .base import Unit"
    assert upward_imports(tree_with(tmp_path, "sharding/single.py", source)) == []


def test_only_one_file_touches_private_names_of_fsdp1() -> None:
    assert fsdp1_private_uses(ROOT / "fsdp_dp") == []


@pytest.mark.parametrize(
    "source",
    [
        "unit._handle.flatten()",
        "infos = flat._param_infos",
        "shapes = flat._shapes",
        "getattr(unit, '_handle', None)",
        "from torch.distributed.fsdp._flat_param import FlatParamHandle",
        "import torch.distributed.fsdp._common_utils",
        "from torch.distributed.fsdp import _runtime_utils",
    ],
)
def test_a_private_name_elsewhere_is_found(tmp_path: Path, source: str) -> None:
    assert len(fsdp1_private_uses(tree_with(tmp_path, "engine.py", source))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (FSDP1_FILE, "handle = unit._handle"),
        ("engine.py", "class A:\n    def f(self):\n        return self._shapes, self._params, self._handles"),
        ("sharding/fsdp2.py", "from torch.distributed.fsdp._fully_shard import FSDPState"),
    ],
)
def test_other_names_are_not_reported(tmp_path: Path, path: str, source: str) -> None:
    assert fsdp1_private_uses(tree_with(tmp_path, path, source)) == []


@pytest.mark.parametrize("module", ["fsdp_dp", "fsdp_dp.accounting", "fsdp_dp.config", "fsdp_dp.ledger"])
def test_import_loads_no_torch(module: str) -> None:
    assert not loads_torch(f"import {module}")


def test_loaded_torch_is_noticed() -> None:
    assert loads_torch("import fsdp_dp\nfsdp_dp.make_private")
