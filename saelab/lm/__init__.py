"""The language model's door: the only package that imports transformer_lens and transformers."""
