"""Other people's SAEs: one file a family of formats, and one for the arithmetic between their conventions and ours."""
