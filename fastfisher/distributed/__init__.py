"""Several processes that share a batch or a model."""
