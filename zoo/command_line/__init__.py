"""The command line: list, show, train, evidence, gap, compare, card and reproduce."""

from zoo.command_line.parser import main

__all__ = ["main"]
