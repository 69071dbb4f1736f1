"""Attribution graphs: which features cause which, from a prompt to its answer."""
