"""Models with networks: deep Gaussian, IMA, Bernoulli, categorical and autoregressive VAEs, and wrapped decoders."""
