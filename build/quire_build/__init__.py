"""From a Hugging Face checkpoint to a model repository: torch module, ONNX, engine, numerics gate."""
