"""Language models: loading, tokenizing, reading and editing activations, generation. The only package that imports
transformer_lens and transformers.
"""
