"""The command line: list, show, train, evidence, gap, compare and card."""

from zoo.command_line.parser import main

__all__ = ["main"]
