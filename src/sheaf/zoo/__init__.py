"""Reference models in plain PyTorch, and tasks on real data that needs no download."""
