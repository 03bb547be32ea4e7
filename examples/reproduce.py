"""Every claim of four papers decided by a run: reproduced, differs, refuted or not decided, with the numbers.

The same as ``elbozoo reproduce``: results are kept one by one in the folder, so that a second call goes on, and a page
of all verdicts is written as Markdown and HTML. With --smoke one claim is run, of a second.

    python examples/reproduce.py --fast
    python examples/reproduce.py --only lucas
"""

from __future__ import annotations

import sys

from zoo.command_line import main as elbozoo


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
    if "--smoke" in words:
        words = [*(word for word in words if word != "--smoke"), "--fast", "--only", "alemi-tight-bounds"]
    return elbozoo(["reproduce", *words])


if __name__ == "__main__":
    sys.exit(main())
