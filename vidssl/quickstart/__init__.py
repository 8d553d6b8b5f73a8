"""The quickstart: the whole pipeline at the scale of minutes, its results as table and pictures."""
