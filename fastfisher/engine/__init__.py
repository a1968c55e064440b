"""What forwards and backwards are watched, replayed and differentiated with."""
