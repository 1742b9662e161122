"""What can be trained, by name: a process that only passes the name on need not import networks."""

from __future__ import annotations

from training.systems import clip, denoiser, prior, vae

CONFIGS = {
    "clip": clip.ClipConfig,
    "vae": vae.VaeConfig,
    "prior": prior.PriorConfig,
    "denoiser": denoiser.DenoiserConfig,
}

FIT = {"clip": clip.fit, "vae": vae.fit, "prior": prior.fit, "denoiser": denoiser.fit}
"""trainable -> fit(config, columns): what the data tells a trainable before it is built."""
