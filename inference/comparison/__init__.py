"""The ELBO gap, split into its parts, and guides side by side."""
