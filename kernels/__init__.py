"""Triton kernels and their launchers, installed as fastfpl.kernels; no autograd, no policy."""
