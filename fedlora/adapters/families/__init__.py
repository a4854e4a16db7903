"""One file for each adapter family; its key is the file's name."""
