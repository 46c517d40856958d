"""Evaluation: embeddings, exact retrieval, and what follows from it. Tensors in, numbers out."""
