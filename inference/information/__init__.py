"""Rate, distortion and mutual information of a pair, and their theory."""
