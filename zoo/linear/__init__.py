"""Linear Gaussian models in closed form: pPCA and the linear VAE."""
