"""MAPA on images, in latent spaces of two and more dimensions, against VAE and IWAE at equal CPU time."""
