"""The tool behind `graphexec warmup`: captures what a configuration needs, reports it, and chooses under a budget."""
