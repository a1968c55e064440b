"""The penalty and Tr(F) in the loops of training frameworks: ``lightning`` and ``transformers``, imported on demand."""
