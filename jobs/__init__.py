"""What each mode does, read from the top down, and the parts they share. `run_lib` chooses among them."""
