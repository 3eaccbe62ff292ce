"""The components that Triton loads: frontend, scheduler and engine.

Nothing outside this folder imports `triton_python_backend_utils`.
"""
