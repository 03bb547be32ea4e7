"""Training, evidence and diagnostics for any Pyro model/guide pair."""
