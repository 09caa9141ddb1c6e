"""Kernels and layers of the engine on CUDA devices. Each is tried on an example before use; torch is the fallback."""
