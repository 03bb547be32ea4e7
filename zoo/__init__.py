"""Generative models whose evidence is known, and the data to fit them to."""
