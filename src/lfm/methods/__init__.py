"""One file per method; the folder is the area and the path is the id."""
