"""Text of the outputs: detokenizing as tokens come, and stop strings."""
