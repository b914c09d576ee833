"""The formats of weights: a file for each, with one `LinearMethod`."""
