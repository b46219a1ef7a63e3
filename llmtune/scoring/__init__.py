"""A live model's answers: likelihoods, generations and divergences."""
