"""The rules of the house, enforced."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "segrl"
FILES = sorted(SOURCE.rglob("*.py"))

# An import may only point down; rooms of one level never import each other.
LEVELS = {
    "types": 0, "protocols": 0, "host": 0,
    "prompts": 1, "objectives": 1, "metrics.functional": 1, "geometry": 1, "models.kernels": 1,
    "rewards": 2, "metrics": 2, "data": 2, "models": 2,
    "rollout": 3, "segmenter": 3,
    "stages": 4,
    "nano": 5, "tracking": 5,
    "runs": 6,
    "__main__": 7, "train": 7, "evaluate": 7, "score": 7, "prepare": 7, "export": 7, "serve": 7, "track": 7,
    "chain": 7, "nano.make": 7,
}  # fmt: skip
# Third-party packages that have one place.
HOMES = {
    "sam2": {"models/sam2_head.py"},
    "mlflow": {"tracking/mlflow_store.py"},
    "vllm": {f"rollout/vllm{part}.py" for part in ("", "_server", "_weights", "_wire")},
}


def room(module: str) -> str:
    parts = module.split(".")
    inner = ".".join(parts[:2])
    return inner if inner in LEVELS else parts[0]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    own = room(name_of(path))
    if own == "__init__":
        return
    for imported in imports(path):
        if not imported.startswith("segrl."):
            continue
        other = room(imported.removeprefix("segrl."))
        if other == own or other == "__init__":
            continue
        assert other in LEVELS, f"{imported}: which room is this?"
        exceptions = {("metrics", "metrics.functional")}
        both_doors = LEVELS[own] == LEVELS[other] == 6 or LEVELS[own] == LEVELS[other] == 0
        down = LEVELS[other] < LEVELS[own] or (own, other) in exceptions or both_doors
        assert down, f"{own} (level {LEVELS[own]}) imports {imported} (level {LEVELS[other]})"


def test_every_room_has_a_level():
    rooms = {room(name_of(path)) for path in FILES} - {"segrl", "__init__"}
    assert rooms == set(LEVELS), rooms ^ set(LEVELS)


@pytest.mark.parametrize("package", HOMES)
def test_packages_stay_in_their_home(package):
    users = {
        p.relative_to(SOURCE).as_posix() for p in FILES if any(i.split(".")[0] == package for i in imports(p))
    }
    assert users == HOMES[package]


def test_no_room_below_runs_reads_a_config():
    allowed = {name for name, level in LEVELS.items() if level >= 6}
    adapters = {"models/sam2_head.py", "tracking/sweep_parent.py"}  # sam2's own YAML; Hydra's callback
    for path in FILES:
        if room(name_of(path)) in allowed or path.relative_to(SOURCE).as_posix() in adapters:
            continue
        assert not any(i.split(".")[0] in ("hydra", "omegaconf") for i in imports(path)), path


def test_commands_stand_at_the_root_and_are_short():
    root = {path for path in FILES if path.parent == SOURCE}
    assert {path.stem for path in root} - {"__init__"} == {
        name for name, level in LEVELS.items() if level == 7 and "." not in name
    } | {"types", "protocols", "segmenter", "geometry"}
    for path in root - {SOURCE / "types.py", SOURCE / "protocols.py"}:
        assert len(path.read_text().splitlines()) <= 160, path


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"


def test_training_step_is_short_and_holds_no_branch_and_no_arithmetic():
    tree = ast.parse((SOURCE / "stages" / "policy_gradient.py").read_text())
    step = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "training_step")
    assert step.end_lineno - step.lineno + 1 <= 25
    assert not [n for n in ast.walk(step) if isinstance(n, ast.If | ast.IfExp | ast.Match)]


def test_no_utils_no_eval_no_unsafe_load_no_public_share():
    assert not [p for p in FILES if re.search(r"utils|helpers|misc|common", p.stem)]
    for path in FILES:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
        assert "weights_only=False" not in text and "share=True" not in text, path
        assert "pickle.load" not in text and "hasattr(" not in text, path


def public(tree):
    """Yield the public functions and classes outside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
        if not isinstance(node, ast.FunctionDef):
            yield from public(node)


def test_public_functions_say_what_they_do_and_return():
    for path in FILES:
        for node in public(ast.parse(path.read_text())):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef):
                assert node.returns is not None, f"{path}: {node.name} has no return type"


def test_no_function_takes_over_a_dozen_arguments():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([one for one in taken if one.arg not in ("self", "cls")])
                assert count <= 12, f"{path}: {node.name} takes {count} arguments"


def test_the_project_speaks_of_itself_alone():
    """No path of a machine in anything that is committed."""
    import subprocess

    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    forbidden = re.compile("|".join(["/" + "work/", "/" + "root/", "/" + "home/", "/" + "opt/"]))
    for name in files:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".json", ".lock", ""} and path.is_file():
            assert not forbidden.search(path.read_text(errors="ignore")), name


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed():
    """What `make test-oldest` installs is the lower bound of pyproject.toml, or its first release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    bounds = dict(
        re.match(r"([\w.-]+)[>=]=([\w.]+)", line).groups()
        for line in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    )
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    wrong = {
        name: (bound, pins.get(name))
        for name, bound in bounds.items()
        if not f"{pins.get(name)}.".startswith(f"{bound}.")
    }
    assert not wrong, f"(bound, pin): {wrong}; the first lines of tests/oldest.txt say how to make it anew"
