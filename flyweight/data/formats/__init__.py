"""One module a data format, found by its file's name: each has `open(path) -> Source`, which raises DataError."""
