"""Moving features of a running model, and measuring what that did and what it cost."""
