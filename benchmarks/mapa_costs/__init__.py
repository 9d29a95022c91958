"""What MAPA costs: its posterior, its training steps, and draws without replacement."""
