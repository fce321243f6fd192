"""How good captions and molecules are, as the field measures it: the protocol of MolT5's evaluation scripts.

Every metric is a function of sums over the rows (`resampling`), so that a bootstrap costs a matrix product.
"""
