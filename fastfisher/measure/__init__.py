"""Traces, norms, spectra: what is measured of gradients and curvature."""
