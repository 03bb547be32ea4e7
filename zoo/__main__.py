"""``python -m zoo`` is the command ``elbozoo``."""

import sys

from zoo.command_line import main

if __name__ == "__main__":
    sys.exit(main())
