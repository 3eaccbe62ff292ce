"""The model `engine`, where the graph runs on a runtime that Triton has no backend for."""
