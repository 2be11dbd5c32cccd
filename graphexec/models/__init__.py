"""The models: which decoders are served, the modules that they are made of, and how checkpoints are loaded."""
