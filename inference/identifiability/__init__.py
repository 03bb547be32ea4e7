"""Whether the latents found are the true ones: IMA contrast, predicted gap, MCC, self-consistency."""
