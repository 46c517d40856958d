"""Contrastive Bayesian metric learning (Kan et al., TPAMI 2023): losses, training, evaluation and tables."""

import os

# Waiting threads must sleep, not spin: when other processes are busy, a spinning thread holds the core that its own
# process is waiting for. PyTorch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
