"""Numerical methods in batches of rows, without probability: optimisers, Jacobians, linear algebra."""
