"""Distributions that vmap and trace, their divergences and their expectations."""
