"""Parts of the LongCat-Tiny training program."""
