"""quadrature."""
