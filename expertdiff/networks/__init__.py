"""Networks ``(x_t, t, y) -> prediction``; importing this makes their bare names known."""
