"""Every claim of four papers decided by a run: reproduced, differs, refuted or not decided, with the numbers.

The same as ``elbozoo reproduce``: results are kept one by one in the folder, so that a second call goes on, and a page
of all verdicts is written as Markdown and HTML. Its options are those of ``elbozoo reproduce --help``, too.

    python examples/reproduce.py --fast
    python examples/reproduce.py --only lucas
"""

from __future__ import annotations

import sys

from _common import example_parser

from zoo.command_line import main as elbozoo

RESUME = "as always: results in the folder are taken from there, unless --again is given"


def parse(argv):
    """The options that all examples have, and the words for ``elbozoo reproduce``, whose options are all others."""
    options = {"cpu_only": "the page states seconds of a core", "resume": RESUME}
    parser = example_parser(__doc__, "claims", seed="initialisation, training and measurement", **options)
    parser.add_argument("--smoke", action="store_true", help="one claim, of a second")
    args, words = parser.parse_known_args(argv)
    words = [*words, "--seed", str(args.seed), "--out", str(args.out)]
    return [*words, "--fast", "--only", "alemi-tight-bounds"] if args.smoke else words


def main(argv=None):
    return elbozoo(["reproduce", *parse(argv)])


if __name__ == "__main__":
    sys.exit(main())
