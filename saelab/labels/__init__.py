"""Labels of features: what each feature is called, by whom, and how far the label can be trusted."""
