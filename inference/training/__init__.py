"""Training of pairs: one run, restarts, and many pairs at once."""
