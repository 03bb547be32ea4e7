"""Another package of the name ``inference`` is named where the import fails, not where half of it is missing."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import inference
from guides._guard import check_inference

ROOT = Path(__file__).parents[2]


def imported(statement, folder):
    """Run an import in a folder that python looks into before this repository."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-c", statement]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["guides", "zoo"])
def test_another_package_of_the_name_is_named(package, tmp_path):
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "__init__.py").write_text("__version__ = '1.8'\n")
    result = imported(f"import {package}", tmp_path)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: expected the package inference of elbozoo, got that in {tmp_path}")


def test_a_folder_without_init_is_not_in_the_way(tmp_path):
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "evidence.py").write_text("x = 1\n")
    result = imported("from inference import evidence, table; print(type(evidence).__name__)", tmp_path)
    assert result.stdout.strip() == "function", result.stderr


def test_the_guard_takes_ours_alone():
    check_inference(inference)
    other = ModuleType("inference")
    with pytest.raises(ImportError, match="got that in an unknown place: rename a folder of that name"):
        check_inference(other)
    other.__path__ = ["/somewhere/inference"]
    with pytest.raises(ImportError, match="/somewhere/inference"):
        check_inference(other)
