"""What each command does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from inference import Gap, compare, evidence, gap, load_pair, save_comparison, save_pair, table
from inference.core.checks import check_count
from inference.core.files import check_writable
from inference.core.storage import atomic_path
from inference.marginal_likelihood.analytic.exact import Exact
from zoo.claims import Settings, as_html, chosen_claims, markdown, run_claims, verdict_counts
from zoo.claims.page import shown
from zoo.claims.running import NOT_REACHED
from zoo.classics import ClassicModel
from zoo.command_line.building import build, train
from zoo.command_line.report import write_report
from zoo.data import Dataset, named_dataset
from zoo.pretrained import Card, card, load, load_card, pairs, save
from zoo.pretrained.cards import check_name, describe, measured_rows, strict_json
from zoo.pretrained.collection import CARD

# Ends the names of files of pairs, which no pair of a folder has.
_FILE = ".safetensors"


class Found(NamedTuple):
    """A pair, with its card where it has one."""

    model: nn.Module
    guide: nn.Module
    card: Card | None


def run_list(args: argparse.Namespace) -> None:
    """A line for each trained pair."""
    cards = {name: load_card(name, args.folder) for name in pairs(args.folder)}
    if _wants_json(args, {name: json.loads(one.to_json()) for name, one in cards.items()}):
        return
    width = max((len(name) for name in cards), default=0) + 2
    print(f"{'pair':{width}s}{'ELBO':>12s}{'log p':>12s}{'gap':>10s}{'k-hat':>8s}  guarantee")
    for name, one in cards.items():
        left = f"{one.elbo.value:12.4f}{one.evidence.value:12.4f}{one.evidence.value - one.elbo.value:10.4f}"
        shape = "-" if one.pareto_k is None else f"{one.pareto_k:.2f}"
        print(f"{name:{width}s}{left}{shape:>8s}  {', '.join(one.guarantee)}")
    print("\nnats per data point, means over the rows measured; elbozoo show PAIR has intervals and checks")


def run_show(args: argparse.Namespace) -> None:
    """The card of one pair."""
    one = load_card(args.pair, args.folder)
    if not _wants_json(args, json.loads(one.to_json())):
        print(one)


def run_train(args: argparse.Namespace) -> None:
    """Train a pair and write it."""
    data = named_dataset(args.data)
    check_writable(args.out)
    pair = build(args.model, args.guide, data.train, args)
    history = train(pair, data.train, args, _checkpoint(args.out))
    save_pair(args.out, *pair)
    done = "nothing to train" if history is None else f"{history.steps} steps in {history.seconds:.0f} s"
    print(f"{describe(pair[0])} with {describe(pair[1])}: {done}; wrote {args.out}")


def run_evidence(args: argparse.Namespace) -> None:
    """log p(x) of each row."""
    one, data, options = _pair_and_data(args)
    guide = None if args.method == Exact.name else one.guide
    options |= {"checkpoint": args.checkpoint, "seed": args.seed}
    found = evidence(one.model, *data, guide=guide, method=args.method, **options)
    numbers = {key: getattr(found, key).tolist() for key in ("value", "lower", "upper", "standard_error")}
    tree = {"method": found.method, "level": found.level, "guarantee": list(found.guarantee), **numbers}
    if not _wants_json(args, tree):
        print(found)


def run_gap(args: argparse.Namespace) -> None:
    """The gap and its parts."""
    one, data, options = _pair_and_data(args)
    found = gap(one.model, one.guide, *data, method=args.method, seed=args.seed, **options)
    if not _wants_json(args, _gap_tree(found)):
        print(f"{found.evidence}\n{found}")


def _gap_tree(found: Gap) -> dict[str, Any]:
    mean = {name: part._asdict() for name, part in found.mean.items()}
    rows = {name: value.tolist() for name, value in vars(found).items() if isinstance(value, Tensor)}
    return {"mean": mean, "rows": rows}


def run_compare(args: argparse.Namespace) -> None:
    """Table, netCDF and report of several pairs."""
    check_count(args.rows, "--rows")
    check_writable(args.out / "comparison.nc")
    data = named_dataset(args.data)
    compared = {name: _find(name, args.folder)[:2] for name in args.pairs} or _trained(data, args)
    x = measured_rows(data, args.rows)
    _check_width(compared, x)
    options = {"num_samples": args.samples, "split": min(args.split, len(x)), "method": args.method}
    tree = compare(None, compared, x, seed=args.seed, **options)
    text = table(tree)
    print(text)
    save_comparison(tree, args.out / "comparison.nc")
    report = write_report(args.out / "report.html", f"Guides on {args.data}", text, tree)
    print(f"\nwrote {args.out / 'comparison.nc'} and {report}")


def _trained(data: Dataset, args: argparse.Namespace) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The pairs of --model and --guide, each trained, or taken from the file of an earlier call where it resumes."""
    found = {}
    for guide in args.guide:
        path = args.out / f"{guide}.safetensors"
        if args.resume and path.exists():
            found[f"{args.model} / {guide}"] = load_pair(path)
            continue
        pair = build(args.model, guide, data.train, args)
        train(pair, data.train, args, _checkpoint(path))
        save_pair(path, *pair)
        found[f"{args.model} / {guide}"] = pair
    return found


def run_card(args: argparse.Namespace) -> None:
    """Measure a pair, and add it to a folder."""
    if args.data is None:
        raise ValueError("expected --data, on which the card's numbers are measured")
    check_name(args.name)
    one = _find(args.pair, args.folder)
    data = named_dataset(args.data)
    _check_width({args.pair: one[:2]}, data.train)
    check_writable(args.out / args.name)
    options = {"rows": args.rows, "split": args.split, "num_samples": args.samples, "simulated": args.simulated}
    command = args.trained_by or ("" if one.card is None else one.card.command)
    found = card(
        one.model,
        one.guide,
        data,
        name=args.name,
        dataset=args.data,
        command=command,
        method=args.method,
        seed=args.seed,
        **options,
    )
    home = save(args.out, one.model, one.guide, found)
    print(f"{found}\n\nwrote {home}")


def run_reproduce(args: argparse.Namespace) -> None:
    """Run claims of the papers, and write the page of their verdicts."""
    settings = Settings(fast=args.fast, paper_scale=args.paper_scale, mnist=args.mnist, seed=args.seed)
    claims = chosen_claims(args.only)
    if args.mnist is not None and not args.mnist.exists():
        raise FileNotFoundError(f"expected --mnist as a file or folder of MNIST, found nothing at {args.mnist}")
    rows = run_claims(claims, settings, args.out / "rows", again=args.again)
    for name, page in (("claims.md", markdown), ("claims.html", as_html)):
        with atomic_path(args.out / name) as path:
            path.write_text(page(rows, settings), encoding="utf-8")
    width = max(len(row.claim.name) for row in rows) + 2
    for row in rows:
        print(f"{row.claim.name:{width}s}{row.verdict:14s}{row.note}".rstrip())
        for one in row.measured:
            print(f"{'':{width}s}{shown(one)}")
    print(f"\n{verdict_counts(rows)}\nwrote {args.out / 'claims.md'} and {args.out / 'claims.html'}")
    if any(row.note == NOT_REACHED for row in rows):
        raise KeyboardInterrupt  # which was held back for the page of what is done


def _pair_and_data(args: argparse.Namespace) -> tuple[Found, tuple[Tensor, ...], dict[str, Any]]:
    """A pair, the data to measure it on, and how they are taken: those of a classic model as one data point."""
    check_count(args.rows, "--rows")
    one = _find(args.pair, args.folder)
    if args.json is not None and str(args.json) != "-":
        check_writable(args.json)
    if isinstance(one.model, ClassicModel):
        if args.data is not None:
            raise ValueError(f"expected no --data, as {args.pair} is measured on its own, got {args.data}")
        return one, one.model.data, {"whole": True}
    name = args.data if args.data is not None else _data_of(one, args.pair)
    x = measured_rows(named_dataset(name), args.rows)
    _check_width({args.pair: one[:2]}, x)
    return one, (x,), {}


def _find(name: str, folder: Path | None) -> Found:
    """A pair by its name, its folder or its file; a file has no card."""
    path = Path(name)
    if path.is_file() or path.suffix == _FILE:
        model, guide = load_pair(path)
        return Found(model.eval(), guide.eval(), None)
    if path.is_dir():
        if not (path / CARD).is_file():
            raise FileNotFoundError(f"expected a pair with {CARD} in the folder {path}, found none")
        return Found(*load(path.name, path.parent))
    return Found(*load(name, folder))


def _data_of(one: Found, name: str) -> str:
    if one.card is None or not one.card.dataset:
        raise ValueError(f"expected --data, as {name} does not say on which data it is to be measured")
    return one.card.dataset


def _check_width(compared: dict[str, Any], x: Tensor) -> None:
    for name, (model, _) in compared.items():
        if isinstance(model, ClassicModel):
            raise ValueError(f"expected a pair for rows of data, got {name}, a classic model with data of its own")
        width = getattr(model, "data_dim", x.shape[1])
        if width != x.shape[1]:
            raise ValueError(f"{name} is a pair for rows of {width} numbers, the data have {x.shape[1]}")


def _checkpoint(path: Path) -> Path:
    return path.with_name(f"{path.stem}.checkpoint{path.suffix}")


def _wants_json(args: argparse.Namespace, tree: Any) -> bool:
    """Write or print numbers as JSON where that is asked for; infinite ends and unknown numbers are null."""
    if args.json is None:
        return False
    text = strict_json(tree)
    if str(args.json) == "-":
        print(text)
        return True
    with atomic_path(args.json) as path:
        path.write_text(text + "\n")
    return False
