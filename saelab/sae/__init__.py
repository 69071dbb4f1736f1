"""The sparse autoencoder: one module, composed of an activation, prefixes, a dictionary, a normaliser and an
initialisation.
"""
