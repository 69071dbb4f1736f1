"""Functions of tensors alone: activation functions, sparse kernels, top-k search, losses and metrics."""
