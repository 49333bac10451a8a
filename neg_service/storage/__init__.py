"""Where results live: objects put whole, parts, run directories, and the reader."""
