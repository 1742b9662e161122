"""Diffusion mathematics: objectives, guidance, sampling. Knows no model, no data, no cluster."""
