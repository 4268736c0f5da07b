"""The truth: every op in plain PyTorch, literal, any dtype, readable by eye."""
