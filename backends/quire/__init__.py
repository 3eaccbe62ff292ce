"""Quire: LLaMA-family checkpoints served from NVIDIA Triton, with continuous batching in Python.

The package is also Triton's backend directory: `model.py` is what the server loads.
"""

__version__ = "0.1.0"
