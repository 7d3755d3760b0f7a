"""What programs speak to the model: wire formats over `phi4mm_jax.service`."""
