"""Triton programs, their launchers and schemas: 2-D, contiguous, no autograd. One file per kernel family."""
