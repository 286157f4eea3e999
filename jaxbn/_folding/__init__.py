"""A traced function, and its batch norms folded into the weights before or after."""
