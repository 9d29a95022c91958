"""MAPA against VAE, IWAE and its own ablations on five curves in the plane, where log p(x) is exact."""
