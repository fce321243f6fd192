"""What a model has aligned: which atoms and which words its tokens and clusters stand for."""
