"""Importance weights of a pair and what is read off them: ELBO, IWAE, effective sample size, Pareto k-hat."""
