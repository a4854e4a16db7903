"""One file for each start, the values that an adapter begins with; its key is the file's name."""
