"""A TensorRT plan run in this process: pinned staging, CUDA graphs, tokens fed back on the GPU."""
