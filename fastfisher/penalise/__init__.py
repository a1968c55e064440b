"""The Fisher penalty and its like, in a training loop."""
