"""Runs, their evaluations, a zoo and data sets as one self-contained page."""
