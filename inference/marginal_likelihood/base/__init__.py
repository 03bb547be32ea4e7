"""Base of the methods that estimate the evidence: their interface, result and intervals."""
