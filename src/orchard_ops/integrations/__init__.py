"""Doors for the libraries that models are written with. Importing one needs that library."""
