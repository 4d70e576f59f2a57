"""Datasets: parsing, the split recipe, the columns on disk, and their servicer."""
