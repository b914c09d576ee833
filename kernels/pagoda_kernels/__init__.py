"""Pagoda's kernels: one folder per operation."""
