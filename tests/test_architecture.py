"""The three floors of the house, and what library code may not contain: read from the source by ``ast``."""

import ast
import importlib
import inspect
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("inference", "guides", "zoo")
# What a package may import of this repository, itself included.
MAY_IMPORT = {"inference": {"inference"}, "guides": {"guides", "inference"}, "zoo": {"zoo", "guides", "inference"}}
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


def public():
    """Every name that a package exports, with the module that exports it."""
    return [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


@pytest.mark.parametrize("path", SOURCES, ids=SOURCE_IDS)
def test_no_import_runs_up_the_house(path):
    assert forbidden_imports(path.read_text(), path.relative_to(ROOT).parts[0]) == set()


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
