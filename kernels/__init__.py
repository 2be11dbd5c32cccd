"""Device code: one file per idea, each with a Triton kernel, its torch reference and the function that picks one."""
