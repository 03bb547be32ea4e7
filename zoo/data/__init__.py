"""Data sets, their files and their preprocessing."""
