"""Mutation testing of the numerical code: does a small random fault in it make a test fail?

    python tests/campaigns/mutants.py --seed 0 --count 100 --reach reach.json

Each mutant is one change of one expression, drawn at random: an operator, a comparison, a sign, a number, a truth
value, a reduction, a condition. The tests of its group of files run once on the sound code, where those that pass in
a few seconds are recorded with the functions that they call. On a copy of the project with the mutant those that call
its function run, one file or folder after the other, the quickest first, until one fails. Prints one line for each
mutant and, in the end, the share that died and the survivors.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
T = "tests/test_inference"
LIKELIHOOD = f"{T}/marginal_likelihood"
INTERVALS = f"{T}/comparison/test_gap_intervals.py"
GAP = [f"{T}/comparison/test_gap_decomposition.py", f"{T}/comparison/test_refit_of_globals.py"]
# Files whose mutants are drawn, and the tests that concern them, in the order in which they run.
TARGETS: dict[str, list[str]] = {
    "inference/weights/*.py": [
        f"{T}/weights",
        f"{T}/pair/test_enumeration.py",
        f"{LIKELIHOOD}/test_estimate.py",
        f"{LIKELIHOOD}/importance",
    ],
    "inference/objectives/*.py": [f"{T}/objectives", "tests/test_conformance/test_objectives.py"],
    "inference/comparison/gap_decomposition.py": [INTERVALS, *GAP],
    "inference/comparison/refit*.py": GAP,
    "inference/comparison/local_problem.py": GAP,
    "inference/comparison/pooled_weights.py": [
        f"{T}/comparison/test_pooled_evidence.py",
        f"{T}/comparison/test_guide_comparison.py",
    ],
    "zoo/linear/gaussian_algebra.py": ["tests/test_zoo/linear"],
    "inference/distributions/*gaussian.py": [f"{T}/distributions", "tests/test_zoo/linear/test_gaussian_algebra.py"],
    "inference/marginal_likelihood/base/*.py": [
        f"{LIKELIHOOD}/base",
        f"{LIKELIHOOD}/test_mean.py",
        f"{LIKELIHOOD}/test_estimate.py",
        f"{LIKELIHOOD}/test_automatic.py",
    ],
    "inference/marginal_likelihood/importance/*.py": [f"{LIKELIHOOD}/importance", f"{LIKELIHOOD}/test_estimate.py"],
    "inference/marginal_likelihood/analytic/*.py": [f"{LIKELIHOOD}/analytic", f"{LIKELIHOOD}/test_estimate.py"],
    "inference/marginal_likelihood/annealing/*.py": [f"{LIKELIHOOD}/annealing"],
    "inference/marginal_likelihood/quadrature/*.py": [f"{LIKELIHOOD}/quadrature"],
    "inference/marginal_likelihood/*.py": [
        f"{LIKELIHOOD}/test_estimate.py",
        f"{LIKELIHOOD}/test_automatic.py",
        f"{LIKELIHOOD}/test_upper_bounds.py",
    ],
}
# Sees the defaults of all public names, and calls none of them.
SIGNATURES = "tests/test_public_api.py::test_the_public_api_is_the_one_on_file"
COPIED = ("inference", "guides", "zoo", "tests", "examples", "setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md")
ARITHMETIC = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.Pow: "*",
    ast.MatMult: "*",
    ast.FloorDiv: "*",
}
COMPARISON = {ast.Lt: ">", ast.LtE: ">", ast.Gt: "<", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not"}
COMPARISON |= {ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}
NAMES = {"sum": "mean", "mean": "sum", "max": "min", "min": "max", "amax": "amin", "amin": "amax", "log": "exp"}
NAMES |= {"exp": "log", "sqrt": "square", "square": "sqrt", "any": "all", "all": "any", "mT": "mH", "cos": "sin"}
NAMES |= {
    "logsumexp": "amax",
    "detach": "clone",
    "argmax": "argmin",
    "argmin": "argmax",
    "abs": "neg",
    "cumsum": "flip",
}
TIERS = (0.1, 1.0)  # CPU seconds: tests of one tier run file by file, since files share fixtures
HEAVY = ("torch.func", "torch.fx.experimental.symbolic_shapes", "torch.fx.experimental.proxy_tensor", "pyro.infer")
HEAVY += ("scipy.stats", "sklearn.datasets", "xarray", "h5netcdf", "matplotlib.pyplot", "doctest")
SKIPPED = (ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)


class Mutant:
    """One change of a file: the text of a node replaced."""

    def __init__(self, path: Path, node: ast.expr, new: str) -> None:
        self.path, self.node, self.new = path, node, new

    def apply(self, source: str) -> str:
        """The source with the change."""
        lines = source.encode().splitlines(keepends=True)
        at = [sum(map(len, lines[: line - 1])) + column for line, column in self._ends()]
        whole = source.encode()
        return (whole[: at[0]] + f"({self.new})".encode() + whole[at[1] :]).decode()

    def _ends(self) -> list[tuple[int, int]]:
        n = self.node
        return [(n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)]

    def __str__(self) -> str:
        old = " ".join(ast.unparse(self.node).split())
        return f"{self.path.relative_to(ROOT)}:{self.node.lineno}: {old[:80]}  ->  {self.new[:80]}"


def expressions(node: ast.AST) -> Iterator[ast.expr]:
    """All expressions that are computed: no annotations, docstrings, decorators, or errors' texts."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "keywords") and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, SKIPPED):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.expr) and not isinstance(child, ast.JoinedStr):
                yield child
            if not isinstance(child, ast.JoinedStr):
                yield from expressions(child)


def changes(node: ast.expr) -> list[str]:
    """What a node may be changed to."""
    text = ast.unparse(node)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return [f"({ast.unparse(node.left)}) {ARITHMETIC[type(node.op)]} ({ast.unparse(node.right)})"]
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISON:
        return [f"{ast.unparse(node.left)} {COMPARISON[type(node.ops[0])]} {ast.unparse(node.comparators[0])}"]
    if isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        return [word.join(f"({ast.unparse(v)})" for v in node.values)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        return [ast.unparse(node.operand)]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return [str(not node.value)]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return [repr(node.value + 1), repr(node.value * 2) if node.value else "1"]
    if isinstance(node, ast.IfExp):
        return [ast.unparse(node.body), ast.unparse(node.orelse)]
    if isinstance(node, ast.Attribute) and node.attr in NAMES and isinstance(node.ctx, ast.Load):
        return [f"{text[: -len(node.attr)]}{NAMES[node.attr]}"]
    return []


def sites() -> list[list[tuple[Path, ast.expr, list[str]]]]:
    """Every place of every file that can be changed, by group of files."""
    groups = []
    for pattern in TARGETS:
        found = []
        for path in sorted(ROOT.glob(pattern)):
            if path.name != "__init__.py":
                tree = ast.parse(path.read_text())
                found += [(path, node, new) for node in expressions(tree) if (new := changes(node))]
        groups.append(found)
    return groups


def draw(seed: int, count: int) -> list[Mutant]:
    """Mutants at random: a group of files in turn, a place of it, a change there; none twice."""
    generator, groups, chosen = random.Random(seed), sites(), dict[str, Mutant]()
    while len(chosen) < count:
        path, node, new = generator.choice(generator.choice(groups))
        mutant = Mutant(path, node, generator.choice(new))
        chosen.setdefault(str(mutant), mutant)
    return list(chosen.values())


def tests_of(path: Path) -> list[str]:
    """The files and folders of tests that concern a file."""
    return next(tests for pattern, tests in TARGETS.items() if path in ROOT.glob(pattern))


class Watch:
    """A plugin of pytest that records the CPU time of each test that passes, and the project's functions it calls."""

    def __init__(self, root: Path, longest: float) -> None:
        self.root, self.longest = str(root), longest
        self.found: dict[str, tuple[float, list[str]]] = {}
        self.failed: set[str] = set()
        signal.signal(signal.SIGPROF, lambda *_: pytest.fail("too long"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Run a test under watch, as long as it may last."""
        called, before = set[CodeType](), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, self.longest)
        sys.settrace(lambda frame, *_: called.add(frame.f_code))
        try:
            return (yield)
        finally:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_PROF, 0)
            ours = sorted(self.name(code) for code in called if code.co_filename.startswith(self.root))
            self.found[item.nodeid] = time.process_time() - before, ours

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what did not pass."""
        if not report.passed:
            self.failed.add(report.nodeid)

    def name(self, code: CodeType) -> str:
        """A function by its file and first line."""
        return f"{Path(code.co_filename).relative_to(self.root)}:{code.co_firstlineno}"

    def passed(self) -> dict[str, tuple[float, list[str]]]:
        """What was recorded of tests that passed."""
        return {test: found for test, found in self.found.items() if test not in self.failed}


class Chosen:
    """A plugin of pytest that runs some tests in an order."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the chosen tests."""
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])


Reached = dict[str, tuple[float, list[str]]]


def reached(tests: str, copy: Path, longest: float) -> Reached:
    """Run tests on the sound copy: those that pass, with their CPU time and the functions that they call."""
    report = copy / "reached.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        watch = Watch(copy, longest)
        _pytest(copy, [tests], watch)
        report.write_text(json.dumps(watch.passed()))
        os._exit(0)
    os.waitpid(child, 0)
    found: Reached = json.loads(report.read_text())
    if not any(name.startswith(("inference/", "zoo/")) for _, names in found.values() for name in names):
        raise RuntimeError(f"expected tests at {tests} that pass and call what they test, got none")
    return found


class Reach:
    """What the tests reach, kept in a file while the code is the same."""

    def __init__(self, copy: Path, file: Path | None, longest: float) -> None:
        self.copy, self.file, self.longest = copy, file, longest
        self.kept: dict[str, Reached] = json.loads(file.read_text()) if file is not None and file.exists() else {}

    def of(self, tests: str) -> Reached:
        """What some tests reach."""
        key = f"{tests} {self._digest(tests)}"
        if key not in self.kept:
            self.kept[key] = reached(tests, self.copy, self.longest)
            if self.file is not None:
                self.file.write_text(json.dumps(self.kept))
        return self.kept[key]

    def _digest(self, tests: str) -> str:
        total = hashlib.sha256()
        for folder in ("inference", "guides", "zoo", tests):
            place = self.copy / folder
            for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
                total.update(path.read_bytes())
        return total.hexdigest()

    def choose(self, mutant: Mutant) -> Iterator[list[str]]:
        """The tests that call a mutant's function, of one file or folder after the other, the quick ones first.

        Outside of functions those that call any of its file.
        """
        file, line = str(mutant.path.relative_to(ROOT)), first_line(mutant)
        if not line:
            yield [SIGNATURES]
        for tests in tests_of(mutant.path):
            chosen = {
                test: cpu
                for test, (cpu, names) in self.of(tests).items()
                if any(name == f"{file}:{line}" if line else name.startswith(f"{file}:") for name in names)
            }
            yield sorted(
                chosen, key=lambda test: (sum(chosen[test] > limit for limit in TIERS), test.split("::")[0], test)
            )


def first_line(mutant: Mutant) -> int:
    """The first line of the function around a mutant; 0 outside of functions."""
    around = [
        node
        for node in ast.walk(ast.parse(mutant.path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.body[0].lineno <= mutant.node.lineno <= (node.end_lineno or node.lineno)
    ]
    if not around:
        return 0
    inner = max(around, key=lambda node: node.lineno)
    return min([inner.lineno, *(decorator.lineno for decorator in inner.decorator_list)])


def fate(mutant: Mutant, copy: Path, tests: list[str], seconds: int) -> str:
    """Run tests on a copy with a mutant: "killed", "survived", or "out of time"."""
    if not tests:
        return "survived"
    place = copy / mutant.path.relative_to(ROOT)
    sound = place.read_text()
    place.write_text(mutant.apply(sound))
    try:
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            signal.alarm(20 * seconds)
            files = sorted({test.split("::")[0] for test in tests})
            os._exit(_pytest(copy, ["-x", *files], Chosen(tests)))
        _, status = os.waitpid(child, 0)
    finally:
        place.write_text(sound)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM):
        return "out of time"
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"expected tests of {mutant}, got none at {tests}")
    return "killed" if code else "survived"


def _pytest(copy: Path, arguments: list[str], plugin: Any) -> int:
    """Run pytest on the copy, silently, in a process that has not imported the project."""
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests"))]
    sys.dont_write_bytecode = True
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    return int(pytest.main(["-n", "0", "-q", "-p", "no:cacheprovider", *arguments], plugins=[plugin]))


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=60, help="CPU seconds of a mutant's tests")
    parser.add_argument("--longest", type=float, default=3.0, help="CPU seconds of a test that is used")
    parser.add_argument("--reach", type=Path, help="file that keeps which tests reach what, for another run")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the mutants that are judged, all by default")
    options = parser.parse_args()
    for name in HEAVY:
        importlib.import_module(name)  # once, for all children
    print(f"{options.count} mutants of seed {options.seed}", flush=True)
    fates: dict[str, list[Mutant]] = {"killed": [], "survived": [], "out of time": []}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        reach = Reach(copy, options.reach, options.longest)
        drawn = sorted(draw(options.seed, options.count), key=lambda mutant: tests_of(mutant.path))
        for i, mutant in enumerate(drawn):
            if options.only is not None and i not in options.only:
                continue
            found, number = "survived", 0
            for tests in reach.choose(mutant):
                found, number = fate(mutant, copy, tests, options.seconds), number + len(tests)
                if found != "survived":
                    break
            fates[found].append(mutant)
            print(f"{i:3d} {found:11s} of {number:4d} tests  {mutant}", flush=True)
    judged = len(fates["killed"]) + len(fates["survived"])
    print(f"{len(fates['killed'])} of {judged} died; {len(fates['out of time'])} ran out of time; survivors:")
    print(*fates["survived"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
