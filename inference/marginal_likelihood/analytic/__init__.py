"""Evidence without samples: closed form, Laplace approximation, near-deterministic limit."""
