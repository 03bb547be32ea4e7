"""The posterior of a model: its log joint, modes, chains, moments, exact draws and predictions."""
