"""A federation of clients that train with DP-SGD: in one process, as a Flower simulation, or deployed."""
