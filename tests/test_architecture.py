"""Rules that a machine keeps: who imports whom, how long a file may grow, what running a file must not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sgsc import pack, prepare, save

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p for top in ("sgsc", "kernels", "bench") for p in (ROOT / top).rglob("*.py") if "sgsc/kernels" not in p.as_posix()
)
# module -> what it may import of ours; a folder stands for all in it. What is absent may import nothing of ours.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "sgsc/quantizers": {"kernels", "quantizers"},
    "sgsc/layers": {"quantizers"},
    "sgsc/coupling": {"layers"},
    "sgsc/cutting": {"coupling", "layers"},
    "sgsc/packed": {"packed", "kernels", "quantizers", "layers", "cutting"},
    "sgsc/files": set(),
    "sgsc/artefact": {"kernels", "artefact", "files", "layers", "packed"},
    "sgsc/distillation": set(),
    "sgsc/preparation": {"layers", "samples"},
    "sgsc/together": {"layers", "quantizers"},
    "sgsc/tuning": {"files", "kernels", "packed"},
    "sgsc/size": {"coupling", "layers"},
    "sgsc/config": set(),
    "sgsc/checkpoint": {"files"},
    "sgsc/samples": set(),
    "sgsc/selectors": {"samples"},
    "sgsc/preservation": {"selectors", "samples"},
    "sgsc/comparison": {"samples"},
    "sgsc/certificate": {"comparison", "preservation", "samples"},
    "sgsc/averaging": {"coupling", "layers"},
    "sgsc/sharding": set(),
    "sgsc/distributed": {"layers", "samples", "sharding"},
    "sgsc/bits": {"distributed", "quantizers", "layers", "sharding"},
    "sgsc/guard": {"bits", "certificate", "coupling", "layers", "preservation", "samples", "size"},
    "sgsc/outcome": {"guard"},
    "sgsc/controller": {"artefact", "bits", "config", "coupling", "cutting", "distributed", "layers"}
    | {"packed", "sharding", "size"},
    "sgsc/compression": {
        *("config", "controller", "distributed", "guard", "layers", "outcome", "preservation", "samples", "sharding"),
        "size",
    },
    "sgsc/integrations": {"checkpoint", "compression", "distributed", "preservation"},
    "sgsc/search": {"search", "artefact", "coupling", "layers", "packed", "preparation", "quantizers", "samples"},
    "sgsc/strategies": {
        "distillation",
        "files",
        "kernels",
        "layers",
        "preparation",
        "quantizers",
        "samples",
        "strategies",
    },
    "sgsc/report": {"report"},
    "sgsc/measure": {"kernels"},
    "sgsc/environment": {"__version__"},
}
EVERYTHING = ("sgsc/demos", "sgsc/cli", "sgsc/__main__", "sgsc/__init__", "bench")


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, type checking aside, as the first part below `sgsc`."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    package = ("sgsc", *inside[:-1]) if inside[0] == "kernels" else inside[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sgsc.")}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            if full[:1] == ("sgsc",):
                found |= {full[1]} if len(full) > 1 else {a.name for a in node.names}
    return found


def rule(path: Path) -> set[str] | None:
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    if name.startswith(EVERYTHING):
        return None
    keys = [key for key in MAY_IMPORT if name == key or name.startswith(f"{key}/")]
    return MAY_IMPORT[keys[0]] if keys else set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    allowed = rule(path)
    if allowed is not None:
        assert imported(path) <= allowed


def test_the_import_check_sees_imports(tmp_path):
    assert "controller" in imported(ROOT / "sgsc/compression.py")
    assert "op" in imported(ROOT / "kernels/packing.py") or "kernels" in imported(ROOT / "kernels/packing.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_outgrows_one_job(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 350, f"{path.name} has {lines} lines; split it by job, not by size"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_edges_print(path):
    name = path.relative_to(ROOT).as_posix()
    if name.startswith(("bench/", "sgsc/cli")):
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("print", "input")]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_running_a_file_needs_no_training_code(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2))
    save(pack(prepare(net).model), tmp_path / "m.sgsc")
    done = run(
        "import sys, torch, sgsc\n"
        "from torch.nn import Conv2d, Flatten, Linear, ReLU, Sequential\n"
        "net = Sequential(Conv2d(1, 4, 3), ReLU(), Flatten(), Linear(16, 2))\n"
        f"print(sgsc.load_into(net, {str(tmp_path / 'm.sgsc')!r})(torch.ones(1, 1, 4, 4)).shape)\n"
        "bad = [m for m in ('sklearn', 'scipy', 'matplotlib', 'optuna', 'sgsc.compression', 'sgsc.preservation',"
        " 'sgsc.coupling', 'sgsc.cutting', 'sgsc.demos') if m in sys.modules]\n"
        "assert not bad, bad"
    )
    assert done.returncode == 0, done.stderr
    assert "[1, 2]" in done.stdout


def test_importing_the_package_imports_nothing_heavy():
    done = run("import sys, sgsc; assert 'torch' not in sys.modules; assert len(sgsc.__all__) > 20; sgsc.prepare")
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    done = run("import sgsc; [getattr(sgsc, n) for n in sgsc.__all__]; assert callable(sgsc.prepare)")
    assert done.returncode == 0, done.stderr
    done = run("import sgsc; sgsc.quantizers.StaticInput; sgsc.artefact.ARCHITECTURES; sgsc.strategies.WEIGHTS")
    assert done.returncode == 0, done.stderr
    done = run("import sgsc; sgsc.nothing")
    assert "module 'sgsc' has no attribute 'nothing'" in done.stderr


FALLBACK = (
    "import warnings, torch, sgsc\n"
    "from sgsc.kernels import OPS, backend\n"
    "with warnings.catch_warnings(record=True) as said:\n"
    "    warnings.simplefilter('always')\n"
    "    model = sgsc.prepare(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))).model\n"
    "    sgsc.pack(model)(torch.ones(1, 4))\n"
    "print(len([w for w in said if 'no C++ extension' in str(w.message)]), said[0].message, backend(OPS['pack']))"
)


def test_without_the_extension_plain_pytorch_runs_and_says_so_once():
    done = run(FALLBACK, SGSC_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 sgsc: no C++ extension (SGSC_NO_EXT=1); CPU tensors use plain PyTorch")
    assert "cpu: PyTorch (SGSC_NO_EXT=1)" in done.stdout


def test_a_failed_build_is_said_once_too():
    hide = "import sys\nsys.modules['sgsc._C'] = None\n"
    done = run(hide + FALLBACK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 sgsc: no C++ extension (")
    assert "Install a C++ compiler and reinstall sgsc" in done.stdout


def test_the_other_package_called_kernels_is_not_shadowed():
    done = run("import kernels")
    assert "No module named 'kernels' (this project's are sgsc.kernels)" in done.stderr


def test_no_public_name_is_hidden_by_a_module_of_that_name():
    done = run("import sgsc, sgsc.demos.job, sgsc.cli; assert all(callable(getattr(sgsc, n)) for n in sgsc.__all__)")
    assert done.returncode == 0, done.stderr
