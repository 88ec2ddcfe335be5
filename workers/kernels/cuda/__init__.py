"""Kernels on an NVIDIA GPU: Triton, CUDA C++ for what that cannot say, cuBLAS for the other GEMMs.

Importing this package needs Triton and touches no GPU.  Every launch can be
captured in a CUDA graph: its grid and arguments depend on the shapes of
tensors and on plain ints, never on what is in device memory.
"""
