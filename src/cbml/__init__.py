"""Contrastive Bayesian metric learning (Kan et al., TPAMI 2023): losses, training, evaluation and tables."""
