"""Chains that are moved from a Gaussian, or a prior, to log p(x, z), temperature by temperature."""
