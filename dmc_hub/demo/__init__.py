"""A page on which controllers of Nav1D act, before and after alignment: `dmc-hub demo`, or a Space."""
