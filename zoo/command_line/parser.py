"""What the command line understands, and what it answers to its caller."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from inference.marginal_likelihood.estimate import METHODS
from zoo.command_line import commands
from zoo.command_line.building import GUIDES, MODELS
from zoo.data import dataset_names

# What a shell reads: done, an error that a sentence explains, interrupted.
DONE, FAILED, INTERRUPTED = 0, 1, 130
_GOES_ON = {
    "train": "; --resume goes on from the last checkpoint",
    "compare": "; --resume goes on from the pairs and the checkpoint in the folder",
    "reproduce": "; the same command goes on from the claims that are in the folder",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and the default of every option."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its words; None takes those of the process.

    Returns:
        0, or 1 after an error that one sentence on standard error explains, or 130 after an interruption. What cannot
        be parsed exits with 2, as argparse does.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the lines, as head does, wants no more of them
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to which the end of the process writes the rest
    except KeyboardInterrupt:
        print(f"interrupted{_GOES_ON.get(args.command, '')}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"elbozoo {args.command}: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="elbozoo", description=_DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"elbozoo {_version()}")
    kinds = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_list, _add_show, _add_train, _add_evidence, _add_gap, _add_compare, _add_card, _add_reproduce):
        add(kinds)
    return parser


_DESCRIPTION = """How far is the ELBO from the evidence log p(x), and why?

A PAIR is the name of a trained pair that comes with the zoo (elbozoo list), the path of a folder that elbozoo card
wrote, or the file that elbozoo train wrote."""


def _version() -> str:
    try:
        return version("elbozoo")
    except PackageNotFoundError:
        return "of unknown version"


def _command(kinds: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
    parser.set_defaults(run=getattr(commands, f"run_{name}"))
    return parser


def _add_list(kinds: argparse._SubParsersAction) -> None:
    parser = _command(kinds, "list", "list the trained pairs, with ELBO and log p(x)")
    _add_folder(parser)
    _add_json(parser)


def _add_show(kinds: argparse._SubParsersAction) -> None:
    parser = _command(kinds, "show", "show the card of a trained pair")
    parser.add_argument("pair", metavar="PAIR")
    _add_folder(parser)
    _add_json(parser)


def _add_train(kinds: argparse._SubParsersAction) -> None:
    parser = _command(kinds, "train", "train a pair on data and write it to a file")
    parser.add_argument("model", choices=list(MODELS))
    _add_guide(parser)
    _add_data(parser, required=True)
    _add_training(parser)
    _add_seed(parser)
    parser.add_argument("--out", type=Path, default=Path("pair.safetensors"), help="file to write")


def _add_evidence(kinds: argparse._SubParsersAction) -> None:
    parser = _command(kinds, "evidence", "estimate log p(x) of each row, with an interval and its guarantee")
    _add_measured_pair(parser)
    _add_method(parser)
    told = "file of finished blocks, whose rows are beside it, to go on from if interrupted"
    parser.add_argument("--checkpoint", type=Path, help=told)
    _add_json(parser)


def _add_gap(kinds: argparse._SubParsersAction) -> None:
    parser = _command(kinds, "gap", "split the gap between log p(x) and ELBO into approximation and amortisation")
    _add_measured_pair(parser)
    _add_method(parser)
    _add_json(parser)


def _add_compare(kinds: argparse._SubParsersAction) -> None:
    parser = _command(kinds, "compare", "compare pairs in a table, a netCDF file and an HTML report")
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help="trained pairs; with none, --model is trained")
    parser.add_argument("--model", choices=list(MODELS), default="deep_gaussian_vae", help="to train, without a PAIR")
    parser.add_argument(
        "--guide", nargs="+", choices=list(GUIDES), default=["mean_field", "full_rank"], help="likewise"
    )
    _add_folder(parser)
    _add_data(parser, required=True)
    _add_training(parser)
    _add_seed(parser)
    _add_rows(parser, 128)
    _add_method(parser)
    parser.add_argument("--samples", type=int, default=1000, help="importance samples per row")
    parser.add_argument("--split", type=int, default=16, help="rows whose gap is split; 0 splits none")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder to write to")


def _add_card(kinds: argparse._SubParsersAction) -> None:
    parser = _command(kinds, "card", "measure a pair and add it with its card to a folder of trained pairs")
    _add_measured_pair(parser)
    _add_method(parser)
    parser.add_argument("--name", required=True, help="the pair's name in the folder, such as my_vae/my_data")
    parser.add_argument("--trained-by", default="", help="the command that made the pair, for the card")
    parser.add_argument("--samples", type=int, default=1000, help="importance samples per row")
    parser.add_argument("--split", type=int, default=16, help="rows whose gap is split")
    parser.add_argument("--simulated", type=int, default=1000, help="simulated data that count coverage; 0 leaves it")
    parser.add_argument("--out", type=Path, default=Path("pairs"), help="folder of trained pairs to add to")


def _add_reproduce(kinds: argparse._SubParsersAction) -> None:
    parser = _command(kinds, "reproduce", "run the claims of four papers, and write a page of the verdicts")
    parser.add_argument("--only", metavar="WORD", help="claims with this in their name, paper or sentence")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fast", action="store_true", help="leave out what takes minutes")
    size.add_argument("--paper-scale", action="store_true", help="steps and runs as in the papers, where known: hours")
    parser.add_argument("--mnist", type=Path, help="file or folder of MNIST, for the claims that need it")
    parser.add_argument(
        "--again", action="store_true", help="run what an earlier call left in --out, too, as after a change"
    )
    _add_seed(parser)
    parser.add_argument("--out", type=Path, default=Path("out") / "claims", help="folder of results and page")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="folder of trained pairs; where none is given, those of the zoo")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="file to write the numbers to as JSON; - prints them")


def _add_guide(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guide", choices=list(GUIDES), default="mean_field", help="family of the guide")


def _add_data(parser: argparse.ArgumentParser, *, required: bool) -> None:
    names = ", ".join(dataset_names())
    parser.add_argument("--data", required=required, help=f"{names} (images: mnist=PATH), or a .npy, .npz or .csv file")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--latent-dim", type=int, default=4, help="K")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64], help="widths of the networks' hidden layers")
    parser.add_argument("--gamma2", type=float, default=100.0, help="final precision of ima_vae")
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--batch-size", type=int, default=256, help="rows of a training step")
    parser.add_argument("--learning-rate", type=float, help="Adam's; where None, 2e-2 linear and 2e-3 deep")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted call")
    parser.add_argument("--device", default="auto", help="auto is CUDA where there is one")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, training and measurement")


def _add_rows(parser: argparse.ArgumentParser, default: int) -> None:
    text = "rows measured, held-out ones where there are any"
    parser.add_argument("--rows", type=int, default=default, help=text)


def _add_measured_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pair", metavar="PAIR")
    _add_folder(parser)
    _add_data(parser, required=False)
    _add_seed(parser)
    _add_rows(parser, 64)


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=sorted(METHODS), default="auto", help="how log p(x) is found")
