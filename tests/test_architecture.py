"""The floors of the packages and of the folders in them, and what library code may not contain: read by ``ast``."""

import ast
import importlib
import inspect
import re
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("inference", "guides", "zoo")
# What a package may import of this repository, itself included.
MAY_IMPORT = {"inference": {"inference"}, "guides": {"guides", "inference"}, "zoo": {"zoo", "guides", "inference"}}
# The folders of a package from the ground up: an import between two of them leads to a lower floor, never to another
# folder of the same one. The package itself re-exports, from above all of them. Some rooms are single files.
FLOORS: dict[str, list[set[str]]] = {
    "inference": [
        {"core", "distributions"},
        {"pair", "numerics"},
        {"weights", "objectives", "posterior", "identifiability"},
        {"training", "marginal_likelihood", "information", "calibration", "diagnostics"},
        {"comparison"},
        {"plots"},
    ],
    "inference.marginal_likelihood": [
        {"base", "upper_bounds"},
        {"analytic", "importance", "quadrature"},
        {"annealing"},
        {"automatic"},
        {"estimate"},
    ],
    "zoo": [
        {"mixings", "priors", "classics"},
        {"base"},
        {"linear", "models"},
        {"benchmarks", "data"},
        {"pretrained", "claims"},
        {"command_line"},
        {"__main__"},
    ],
}
OURS = {"inference", "guides", "zoo", "examples", "tests", "conftest", "registry", "references"}
# Endings of dotted names: global state that only a user may touch, Pyro's own parameters, and files that execute code.
FORBIDDEN = {
    "clear_param_store",
    "set_rng_seed",
    "enable_validation",
    "settings.set",
    "pyro.module",
    "PyroParam",
    "PyroSample",
    "pickle",
    "torch.load",
    "torch.save",
    "set_default_dtype",
    "set_default_device",
    "set_num_threads",
    "filterwarnings",
}

METHODS = (types.FunctionType, property)
LONGEST_TEST_NAME = 65

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SOURCE_IDS = [str(path.relative_to(ROOT)) for path in SOURCES]


def imports(source):
    """Full names of the modules that a source imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used_names(source):
    """Every dotted name that a source uses or imports, and all connected parts of it: a.b.c, a.b, b.c, a, b, c."""
    names = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name | ast.Attribute)]
    parts = [name.split(".") for name in [*names, *imports(source)]]
    return {".".join(p[i:j]) for p in parts for i in range(len(p)) for j in range(i + 1, len(p) + 1)}


def forbidden_imports(source, package):
    return {name.split(".")[0] for name in imports(source)} & (OURS - MAY_IMPORT[package])


def forbidden_names(source):
    return used_names(source) & FORBIDDEN


def room(module, package):
    """The folder or file of a package that a dotted name leads into; "" for the package itself, None for elsewhere."""
    parts, depth = module.split("."), package.count(".") + 1
    if ".".join(parts[:depth]) != package:
        return None
    return next((part for part in parts[depth:] if part in set().union(*FLOORS[package])), "")


def floor_of(package):
    return {name: level for level, names in enumerate(FLOORS[package]) for name in names}


def lower_rooms(source, module, package):
    """The rooms of a package that a module of it imports, its own left out."""
    own = room(module, package)
    found = {room(name, package) for name in imports(source)}
    return found - {None, own}


def climbing_imports(source, module, package):
    """The rooms that a module of a package imports though they do not stand below its own."""
    level, own = floor_of(package), room(module, package)
    if not own:  # the package itself re-exports
        return set()
    return {to for to in lower_rooms(source, module, package) if not to or level[to] >= level[own]}


def module_name(path):
    """The dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(package):
    """(dotted name, source) of every file under a package, for the packages with floors."""
    return [(name, path.read_text()) for path in SOURCES if (name := module_name(path)).startswith(f"{package}.")]


def exported_functions():
    """Names of the functions that the packages and their subpackages export."""
    packages = [importlib.import_module(module_name(path)) for path in SOURCES if path.name == "__init__.py"]
    exported = [(package, name) for package in packages for name in getattr(package, "__all__", ())]
    return {name for package, name in exported if inspect.isfunction(getattr(package, name))}


def shadowed(modules, functions):
    """The modules that bear the name of a function: an import of them may yield the one or the other."""
    return {module for module in modules if module.split(".")[-1] in functions}


def long_test_names(source):
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    names = [node.name for node in functions if node.name.startswith("test_")]
    return [name for name in names if len(name) > LONGEST_TEST_NAME]


def public():
    """Every name that a package exports, with the module that exports it."""
    return [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


@pytest.mark.parametrize("path", SOURCES, ids=SOURCE_IDS)
def test_no_import_runs_up_the_house(path):
    assert forbidden_imports(path.read_text(), path.relative_to(ROOT).parts[0]) == set()


@pytest.mark.parametrize("package", FLOORS)
def test_no_import_runs_up_or_along_a_floor_of_folders(package):
    found = {name: climbing_imports(source, name, package) for name, source in modules_of(package)}
    assert {name: rooms for name, rooms in found.items() if rooms} == {}


@pytest.mark.parametrize("package", FLOORS)
def test_every_folder_stands_on_a_floor_and_on_the_lowest_it_can(package):
    level, below = floor_of(package), {name: {-1} for name in floor_of(package)}
    for name, source in modules_of(package):
        assert room(name, package), f"{name} stands on no floor of FLOORS[{package!r}]"
        below[room(name, package)] |= {level[to] for to in lower_rooms(source, name, package) if to}
    assert {name: 1 + max(levels) for name, levels in below.items()} == level


@pytest.mark.parametrize(
    ("package", "module", "source", "found"),
    [
        ("inference", "inference.pair.run", "from inference.weights.summary import elbo", {"weights"}),
        ("inference", "inference.weights", "import inference.plots.comparison as p", {"plots"}),
        ("inference", "inference.numerics.newton", "from inference.weights import psis", {"weights"}),
        ("inference", "inference.numerics.newton", "def f():\n    from inference import evidence", {""}),
        ("inference", "inference.plots.rates", "from inference.core.checks import check_count", set()),
        ("inference", "inference.pair.run", "from inference.pair.draw import Draw\nimport torch", set()),
        ("inference", "inference", "from inference.plots import figure", set()),
        (
            "inference.marginal_likelihood",
            "inference.marginal_likelihood.importance.proposal",
            "from inference.marginal_likelihood.annealing.chains import run",
            {"annealing"},
        ),
        (
            "inference.marginal_likelihood",
            "inference.marginal_likelihood.base.result",
            "from inference.marginal_likelihood import estimate",
            {"estimate"},
        ),
        ("zoo", "zoo.base", "from zoo.models.vae import VAE", {"models"}),
        ("zoo", "zoo.linear.models", "from zoo.models.vae import VAE", {"models"}),
        ("zoo", "zoo.data.datasets", "from zoo.base import LatentVariableModel", set()),
    ],
)
def test_the_floor_check_finds_what_it_should(package, module, source, found):
    assert climbing_imports(source, module, package) == found


def test_no_module_bears_the_name_of_an_exported_function():
    assert shadowed(map(module_name, SOURCES), exported_functions()) == set()


def test_the_shadow_check_finds_what_it_should():
    assert {"evidence", "compare", "log_weights"} <= exported_functions()
    modules = ["inference.evidence", "inference.comparison.compare", "inference.comparison", "zoo"]
    assert shadowed(modules, exported_functions()) == {"inference.evidence", "inference.comparison.compare"}


def test_no_test_name_is_longer_than_it_may_be():
    found = {path.name: long_test_names(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: names for name, names in found.items() if names} == {}


def test_the_length_check_finds_what_it_should():
    short, long = "test_" + "a" * (LONGEST_TEST_NAME - 5), "test_" + "a" * (LONGEST_TEST_NAME - 4)
    source = "\n".join(f"def {name}():\n    assert True" for name in (short, long))
    assert long_test_names(source) == [long]


def rows_of_tables(text):
    """The cells of every row of every table of a Markdown text, without the quotes of code."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


CONTRIBUTING = rows_of_tables((ROOT / "CONTRIBUTING.md").read_text())


def test_contributing_tells_the_floor_of_every_folder():
    told = {cells[1].removesuffix(".py"): int(cells[0]) for cells in CONTRIBUTING if cells[0].isdigit()}
    packages = ("inference", "zoo")
    assert told == {f"{package}/{name}": floor for package in packages for name, floor in floor_of(package).items()}


@pytest.mark.parametrize(
    ("folder", "name"), [cells[1:] for cells in CONTRIBUTING if not cells[0].isdigit() and cells[1] != "folder"]
)
def test_the_index_of_contributing_names_the_folder_that_holds_it(folder, name):
    defined = rf"^(class|def) {name.split('.')[0]}\b"
    assert [path for path in (ROOT / folder).glob("**/*.py") if re.search(defined, path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("path", SOURCES, ids=SOURCE_IDS)
def test_library_code_leaves_global_state_to_the_user(path):
    assert forbidden_names(path.read_text()) == set()


@pytest.mark.parametrize(
    ("package", "source", "found"),
    [
        ("inference", "import zoo", {"zoo"}),
        ("inference", "def f():\n    from guides.exact import Exact", {"guides"}),
        ("guides", "import inference, zoo.base as b", {"zoo"}),
        ("zoo", "from tests import conftest", {"tests"}),
        ("zoo", "from guides import Exact\nimport inference\nimport torch", set()),
    ],
)
def test_the_import_check_finds_what_it_should(package, source, found):
    assert forbidden_imports(source, package) == found


@pytest.mark.parametrize(
    "source",
    [
        "import pyro\npyro.clear_param_store()",
        "from pyro import set_rng_seed",
        "import pyro as p\np.clear_param_store()",
        "import pickle",
        "from torch import load",
        "x = torch.load(f)",
        "from pyro.nn import PyroParam",
        "pyro.nn.PyroSample(prior)",
    ],
)
def test_the_name_check_finds_what_it_should(source):
    assert forbidden_names(source) != set()


def test_every_package_is_looked_at():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
    assert {(package, "__init__.py") for package in PACKAGES} <= {path.relative_to(ROOT).parts for path in SOURCES}


@pytest.mark.parametrize(("package", "name"), public())
def test_every_exported_name_exists_and_is_documented(package, name):
    thing = getattr(importlib.import_module(package), name)
    assert inspect.isclass(thing) or inspect.isfunction(thing), f"{package}.{name} is {thing}"
    # A class without a docstring would show its base's, a dataclass its signature.
    text = thing.__doc__ or ""
    assert text.strip(), f"{package}.{name} has no docstring"
    assert not text.startswith(f"{name}("), f"{package}.{name} has no docstring but its signature"


@pytest.mark.parametrize(("package", "name"), public())
def test_every_public_method_of_an_exported_class_is_documented(package, name):
    thing = getattr(importlib.import_module(package), name)
    members = vars(thing) if inspect.isclass(thing) else {}
    methods = [k for k, v in members.items() if isinstance(inspect.unwrap(getattr(v, "__func__", v)), METHODS)]
    assert [k for k in methods if not k.startswith("_") and not inspect.getdoc(getattr(thing, k))] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_is_exported_twice(package):
    names = importlib.import_module(package).__all__
    assert len(set(names)) == len(names)
