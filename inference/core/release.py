"""Name and version of the distribution, which its three packages share."""

__distribution__ = "elbozoo"
__version__ = "0.2.0"
