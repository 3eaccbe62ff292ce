"""The plan's own kernels, written in the Triton language: one file each, arguments in TensorRT's order.

TensorRT's ahead-of-time plugins pass input pointers, then integers, then output pointers; so do these.
"""
