"""What everything else stands on: one call of a pair, its runs and draws, checks, seeds, files."""
