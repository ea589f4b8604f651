"""What a run leaves behind, and every format of weights that is read or written."""
