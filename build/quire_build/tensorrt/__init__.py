"""From model.onnx to a TensorRT plan: lowering rewrites, kernels in the Triton language, the plan builder."""
