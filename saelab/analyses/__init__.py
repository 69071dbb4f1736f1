"""What feature stores and dictionaries tell: one verb a file, each returning a frozen result."""
