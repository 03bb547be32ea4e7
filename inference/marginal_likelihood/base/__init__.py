"""What every method of estimating the evidence is given and gives: method, result, intervals."""
