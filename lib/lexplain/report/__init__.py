"""The HTML report of a run: `reading` takes it from the tables, `contents` says what it is, `rendering` writes one file.

Nothing is re-exported here: rendering knows no Spark, and is imported without it.
"""
