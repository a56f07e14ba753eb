"""swarmoe: train one Mixture-of-Experts model together. The public face: re-exports, no logic."""

__version__ = "0.1.0"
