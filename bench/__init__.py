"""Benchmarks: one file per promise of the README. ``make bench`` runs them and writes bench/results/."""
