"""Training objectives: each a pyro.infer.ELBO that gives a bound per data point, to be maximised."""
