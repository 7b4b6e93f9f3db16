"""Decoding: rows, token steps, sampling, detokenising, prompts and answers."""
