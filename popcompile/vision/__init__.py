"""Images become embeddings: a vision-language model's tower, and its features in the places of image tokens."""
