"""Likelihoods: which distribution of a label the output of a model stands for, one class each."""
