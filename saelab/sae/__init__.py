"""Sparse autoencoders and transcoders: one module, configured by activation function, prefixes, dictionary, normaliser
and initialisation.
"""
