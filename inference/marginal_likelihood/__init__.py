"""Estimating the evidence log p(x): the methods and the entry point that chooses between them."""
