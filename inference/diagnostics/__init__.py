"""What is wrong with a trained pair: posterior collapse, posterior error, curvature, gradient noise."""
