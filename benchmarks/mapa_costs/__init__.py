"""What MAPA costs: its posterior, its training steps, batches of neighbours, and draws without replacement."""
