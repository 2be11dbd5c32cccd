"""Mechanism: how a callable becomes graphs, one per batch-size bucket."""
