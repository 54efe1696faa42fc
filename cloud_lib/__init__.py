"""CLOUD: crystals as symmetry strings, a BERT encoder pre-trained on them, and the paper's results rebuilt."""

__version__ = "0.1.0"
