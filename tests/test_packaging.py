"""What a user installs: the three packages and nothing else, their type marker, and what setup.cfg promises."""

import ast
import configparser
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from inference import plots

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "setup.cfg",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "zoo",
        "guides",
        "inference",
        "tests",
        "examples",
    ):
        (source / name).symlink_to(ROOT / name)
    build = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    pytest.importorskip("setuptools")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("elbozoo-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"zoo", "guides", "inference"}
    for package in ("zoo", "guides", "inference"):
        assert f"{package}/py.typed" in names
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).glob("**/*.py")}
        assert sources == {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")}
    trained = {str(path.relative_to(ROOT)) for path in (ROOT / "zoo/pretrained/weights").rglob("*.*")}
    assert trained
    assert trained == {name for name in names if name.startswith("zoo/pretrained/weights/")}
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/METADATA"))).decode()
    version = (ROOT / "inference/core/release.py").read_text().split('__version__ = "')[1].split('"')[0]
    assert f"\nVersion: {version}\n" in metadata
    assert "License-Expression: Apache-2.0" in metadata or "License: Apache-2.0" in metadata


def imported(path):
    """Top-level names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_every_import_of_the_packages_is_a_declared_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"] + "\n" + config["options.extras_require"]["flows"]
    declared = {re.split(r"[<>=!~\[ ]", line)[0] for line in lines.split("\n") if line}
    names = {"pyro": "pyro-ppl", "sklearn": "scikit-learn", "opt_einsum": "opt-einsum", "arviz_stats": "arviz"}
    allowed = {*sys.stdlib_module_names, "zoo", "guides", "inference"}
    for path in [p for package in ("zoo", "guides", "inference") for p in (ROOT / package).glob("**/*.py")]:
        for module in imported(path):
            assert module in allowed or names.get(module, module) in declared, f"{path}: {module} is not declared"


def test_an_import_loads_no_library_of_a_few_functions():
    scipy = ("scipy.optimize", "scipy.special", "scipy.stats")
    heavy = ("arviz", "matplotlib", "pandas", *scipy, "sklearn", "torch._dynamo", "torch._inductor", "xarray", "zuko")
    code = f"import sys, zoo, guides, inference; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_the_version_is_the_same_everywhere():
    version = (ROOT / "inference/core/release.py").read_text().split('__version__ = "')[1].split('"')[0]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_holds_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "\npip install -e . && python examples/elbo_gap.py\n" in text
    assert '\npip install -e ".[test]" && pytest\n' in text


EXECUTED = [ROOT / "docs/gallery.md", *sorted((ROOT / "docs/tutorials").iterdir())]
PAGES = sorted(set((ROOT / "docs").glob("*.md")) - set(EXECUTED))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_python_of_the_documentation_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert ("print(" in "".join(blocks)) == bool(capsys.readouterr().out)


def cells_of(page):
    """The code of a page that is executed when the documentation is built."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return re.findall(r"```\{code-cell\} python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", EXECUTED, ids=lambda path: path.stem)
def test_the_executed_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in cells_of(page):
        exec(cell, names)


def test_notebooks_hold_the_output_of_every_cell_and_no_paths():
    for page in (ROOT / "docs/tutorials").glob("*.ipynb"):
        cells = [cell for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code"]
        assert all(cell["outputs"] or cell["source"][-1].startswith(("decoder", "encoder", " ")) for cell in cells)
        assert not re.search(r"/work/|/home/|/root/|Traceback", page.read_text())


def test_the_gallery_shows_every_figure():
    shown = (ROOT / "docs/gallery.md").read_text()
    for name in set(plots.__all__) - {"save_figure"}:
        assert f"`{name}`" in shown
        assert f"plots.{name}(" in shown


def test_the_documentation_lists_every_subpackage():
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    for package in ("zoo", "inference"):
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")} - {"command_line"}
        assert folders == set(re.findall(rf"automodule:: {package}\.(\w+)", pages))


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {
        "decoder": torch.nn.Linear(32, 784),
        "encoder": torch.nn.Linear(784, 64),
        "x_train": torch.randn(6, 784),
        "x_test": torch.randn(4, 784),
    }
    for block in blocks:
        exec(block.replace("steps=3000", "steps=3"), names)
    assert len(blocks) == 4
    assert "log p: importance" in capsys.readouterr().out
    assert names["weights"].shape == (1000, 360)
    assert names["log_p"].value.shape == (1,)
    assert (tmp_path / "run.safetensors").exists()
