"""The campaigns run, in small: what they find in large stands in RESULTS.md."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL = {
    "killed": ["kill_runs.py", "--runs", "2", "--doors", "fit", "importance", "gap", "table"],
    "interrupted": ["kill_runs.py", "--runs", "2", "--signal", "INT", "--doors", "fit", "fit_many"],
    "damaged files": ["fuzz_readers.py", "--files", "1000"],
}


def run(arguments):
    command = [sys.executable, "-W", "ignore", HERE / arguments[0], *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent.parent)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", SMALL.values(), ids=SMALL)
def test_a_campaign_finds_nothing(arguments):
    done = run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with other bits or unusable, 0 steps lost" in done.stdout or "files, 0 bad" in done.stdout


def test_every_file_that_is_mutated_has_tests_that_exist():
    targets = runpy.run_path(str(HERE / "mutants.py"))["TARGETS"]
    for pattern, tests in targets.items():
        assert list(HERE.parent.parent.glob(pattern)), pattern
        assert all((HERE.parent.parent / path).exists() for path in tests), tests


@pytest.mark.slow
def test_a_random_mutant_is_judged():
    done = run(["mutants.py", "--count", "1", "--seed", "3"])
    assert "1 mutants of seed 3" in done.stdout
    assert "ran out of time; survivors:" in done.stdout
