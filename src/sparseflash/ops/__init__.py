"""One file an op: what it takes, its gradients, its registration with PyTorch."""
