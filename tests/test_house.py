"""The rules of CONTRIBUTING.md that can be checked: layers, circles, sizes, names, declarations, no speed in tests."""

import ast
import builtins
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((REPOSITORY / "keyreid").rglob("*.py"))
}
OPTIONAL_TOOLS = {"openpifpaf"}  # launch/install-pose builds it; it is no dependency, for its licence


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, own_name: str = "") -> set[str]:
    """What a file imports, anywhere in it: names of modules of ours, dotted, and the first names of others."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in FILES else node.module for module in modules}
    return {name if name.split(".")[0] == "keyreid" else name.split(".")[0] for name in found} - {own_name}


def layers() -> dict[str, int]:
    """The table in CONTRIBUTING.md: name of a module or package below keyreid/ -> its layer."""
    rows = re.findall(r"^\| *(\d+) *\|([^|]+)\|", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {name: int(number) for number, names in rows for name in re.findall(r"`(\w+)`", names)}


OURS = {name: {other for other in imports(path, name) if other.startswith("keyreid")} for name, path in FILES.items()}


def test_every_module_has_a_layer():
    there = {name.split(".")[1] for name in FILES if "." in name}
    assert there == set(layers())


def test_imports_go_down_the_layers():
    layer = layers()
    upwards = []
    for name, others in OURS.items():
        for other in others - {"keyreid"}:
            own, its = name.split(".")[1], other.split(".")[1]
            if own != its and layer.get(own, 0) <= layer.get(its, 0):
                upwards.append(f"{name} (layer {layer.get(own)}) imports {other} (layer {layer.get(its)})")
    assert not upwards, "\n" + "\n".join(sorted(upwards))


def test_no_circles_among_modules_and_packages():
    packages = defaultdict(set)
    for name, others in OURS.items():
        packages[package(name)] |= {package(other) for other in others} - {package(name)}
    for graph in (OURS, packages):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail("a circle: " + " -> ".join(reversed(error.args[1])))


def package(name: str) -> str:
    """The package that a module belongs to; a module beside cli.py is one of its own."""
    return name if FILES[name].name == "__init__.py" or name.count(".") == 1 else name.rpartition(".")[0]


def test_no_long_modules_and_functions():
    long = []
    for name, path in FILES.items():
        lines = len(path.read_text().splitlines())
        long += [f"{name}: {lines} lines"] if lines > 400 else []
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                long += [f"{name}.{node.name}: {lines} lines"] if lines > 60 else []
    assert not long, "\n" + "\n".join(long)


def test_no_module_has_the_name_of_one_of_pythons():
    shadows = sys.stdlib_module_names | set(dir(builtins))
    assert not [name for name in FILES if name.rpartition(".")[2] in shadows]


def test_nothing_is_importable_outside_keyreid():
    scripts = {"benchmarks", "tests"}  # run as files; no package
    outside = [path for path in REPOSITORY.glob("*/**/*.py") if path.relative_to(REPOSITORY).parts[0][0] != "."]
    strays = [p for p in outside if p.relative_to(REPOSITORY).parts[0] not in {"keyreid", *scripts}]
    packages = [p for p in outside if p.name == "__init__.py" and p.relative_to(REPOSITORY).parts[0] in scripts]
    at_top = [path for path in REPOSITORY.glob("*.py") if path.name != "setup.py"]
    assert not [*strays, *packages, *at_top]


def test_what_is_imported_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = sum(project["optional-dependencies"].values(), project["dependencies"])
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    provided = metadata.packages_distributions()
    missing = {
        f"{module} in {name}"
        for name, path in FILES.items()
        for module in imports(path)
        if not module.startswith("keyreid") and module not in sys.stdlib_module_names | OPTIONAL_TOOLS
        if declared.isdisjoint(map(canonicalize_name, provided.get(module, [module])))
    }
    assert not missing


def test_no_message_names_a_package_that_is_not_ours():
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("shards/*.md")]
    told = re.compile(r"pip install[^\n]*\bkeyreid\b")
    assert not [path for path in [*FILES.values(), *pages] if told.search(path.read_text())]


def test_the_command_line_opens_without_heavy_imports():
    """Help, completion and --version answer at once: nothing imports torch before a verb runs."""
    heavy = {"torch", "mlflow", "ray", "timm", "numpy", "pandas", "scipy", "cv2", "pydantic"}
    code = "import sys, keyreid.cli; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert not heavy & set(result.stdout.split())


def test_speed_and_memory_are_asserted_nowhere():
    """A test may wait for something until a deadline, that is all that it needs a clock for."""
    measures = re.compile(r"perf_counter|process_time|timeit|tracemalloc|getrusage|max_?rss|rss_?anon|vm_?rss", re.I)
    elapsed = re.compile(r"assert [^\n]*\b(time\.(time|monotonic)\(\)|elapsed|seconds) *(-|<)")
    tests = [path for path in REPOSITORY.glob("tests/**/*.py") if path != Path(__file__).resolve()]
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in tests
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if measures.search(line) or (elapsed.search(line) and "deadline" not in line)
    ]
    assert not found, "\n" + "\n".join(found)
