"""What comes out: outputs of requests, who collects them from steps, and who gets them."""
