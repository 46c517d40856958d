"""Contrastive Bayesian metric learning (Kan et al., TPAMI 2023): losses, training, evaluation and tables."""

import os

# Threads that wait are to sleep, not to spin: a spinning one holds a core that its own process may be waiting for, as
# soon as other processes are busy, too. PyTorch looks at this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
