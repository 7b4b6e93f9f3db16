"""Model families: the only readers of the module names of Hugging Face models."""
