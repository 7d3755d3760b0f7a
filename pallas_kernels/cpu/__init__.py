"""Kernels in C++ for the CPU, which XLA calls through its foreign function interface."""
