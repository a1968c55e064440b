"""The forwards of layers that run through kernels of this package."""
