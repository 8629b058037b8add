"""Triton kernels of llmops, one op a file. Needs torch and triton, nothing else; importing it imports neither."""

__version__ = "0.1.0"
