"""Sentence vectors: pooling, losses, Siamese training, the sentence encoder, its uses, and the embedding export."""
