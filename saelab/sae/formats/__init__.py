"""Reading and writing SAEs of other libraries: one module per format, and one for the conversion between their
conventions and saelab's.
"""
