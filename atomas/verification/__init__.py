"""Golden numbers of the authors' published implementation, reproduced by our own model."""
