"""Mutation testing of the numerical code: does a small random fault in it make a test fail?

    python tests/campaigns/mutants.py --seed 0 --count 100

Each mutant is one change of one expression, drawn at random: an operator, a comparison, a sign, a number, a truth
value, a reduction, a condition. The tests that concern its file run on a copy of the project, the closest first, until
one fails. Prints one line for each mutant and, in the end, the share that died and the survivors.
"""

from __future__ import annotations

import argparse
import ast
import importlib
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

ROOT = Path(__file__).parent.parent.parent
T = "tests/test_inference"
LIKELIHOOD = f"{T}/marginal_likelihood"
# Files whose mutants are drawn, and the tests that concern them.
TARGETS: dict[str, list[str]] = {
    "inference/weights/*.py": [f"{T}/weights", f"{LIKELIHOOD}/test_estimate.py", f"{LIKELIHOOD}/importance"],
    "inference/objectives/*.py": [f"{T}/objectives", "tests/test_conformance/test_objectives.py"],
    "inference/comparison/gap_decomposition.py": [f"{T}/comparison/test_gap_decomposition.py"],
    "inference/comparison/refit*.py": [f"{T}/comparison/test_gap_decomposition.py"],
    "inference/comparison/local_problem.py": [f"{T}/comparison/test_gap_decomposition.py"],
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
    "inference/marginal_likelihood/*.py": [f"{LIKELIHOOD}/test_estimate.py", f"{LIKELIHOOD}/test_automatic.py"],
}
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
    """The tests that concern a file, the closest first."""
    return next(tests for pattern, tests in TARGETS.items() if path in ROOT.glob(pattern))


def fate(mutant: Mutant, copy: Path, seconds: int) -> str:
    """Run a mutant's tests: "killed", "survived", or "out of time"."""
    place = copy / mutant.path.relative_to(ROOT)
    sound = place.read_text()
    place.write_text(mutant.apply(sound))
    try:
        child = os.fork()
        if child == 0:
            _run_tests(copy, tests_of(mutant.path), seconds)
        _, status = os.waitpid(child, 0)
    finally:
        place.write_text(sound)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return "out of time"
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
    if code in (4, 5):  # pytest's usage error, and no tests
        raise RuntimeError(f"expected tests of {mutant.path}, got none at {tests_of(mutant.path)}")
    return "killed" if code else "survived"


def _run_tests(copy: Path, tests: list[str], seconds: int) -> None:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests"))]
    sys.dont_write_bytecode = True
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    code = pytest.main(["-n", "0", "-x", "-q", "-p", "no:cacheprovider", *tests])
    os._exit(int(code))


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=300, help="CPU seconds of a mutant's tests")
    parser.add_argument("--skip", type=int, default=0, help="mutants that an earlier run has judged")
    options = parser.parse_args()
    for name in ("torch.func", "pyro.infer", "scipy.stats", "sklearn.datasets", "xarray", "matplotlib.pyplot"):
        importlib.import_module(name)  # once, for all children
    print(f"{options.count} mutants of seed {options.seed}", flush=True)
    fates: dict[str, list[Mutant]] = {"killed": [], "survived": [], "out of time": []}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for i, mutant in list(enumerate(draw(options.seed, options.count)))[options.skip :]:
            start = time.perf_counter()
            found = fate(mutant, copy, options.seconds)
            fates[found].append(mutant)
            print(f"{i:3d} {found:11s} {time.perf_counter() - start:5.0f} s  {mutant}", flush=True)
    judged = len(fates["killed"]) + len(fates["survived"])
    print(f"{len(fates['killed'])} of {judged} died; {len(fates['out of time'])} ran out of time; survivors:")
    print(*fates["survived"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
