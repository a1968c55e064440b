"""Demonstrations of the paper's claims, each a set of training runs, a figure and a report."""
