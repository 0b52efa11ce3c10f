"""Facades: the public names of other libraries, driving this one's parts."""
