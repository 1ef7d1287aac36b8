"""Public ops, one a file: argument checks, gradients, registration as a PyTorch custom op."""
