"""The data door: atomic files, read and checked."""
