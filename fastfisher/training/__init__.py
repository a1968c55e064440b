"""The standard training script: data sets, networks, configuration, the loop, what a run leaves on disk."""
