"""Scenes that LongCat-Tiny is trained to draw, and plain image analysis that says whether it did."""
