"""Numerical methods in batches of rows, without probability: optimisers, Jacobians, linear algebra."""

from inference.numerics.jacobian import column_angles, column_norms, decoder_jacobian

__all__ = ["column_angles", "column_norms", "decoder_jacobian"]
