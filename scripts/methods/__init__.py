"""What `compare_methods.py` is made of: the methods, the worlds that tell them apart, and the page."""
