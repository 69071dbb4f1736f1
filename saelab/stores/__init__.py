"""Data on disk: atomic writing of files and folders, activation stores read in shuffled batches, feature stores."""
