"""A TensorRT plan run in this process: steps prepared in pinned memory, CUDA graphs, tokens fed back on the GPU."""
