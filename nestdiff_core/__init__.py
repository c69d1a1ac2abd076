"""nestdiff: hierarchical latent diffusion.

After "Nested Diffusion Models Using Hierarchical Latent Priors" (arXiv 2412.05984).
"""
