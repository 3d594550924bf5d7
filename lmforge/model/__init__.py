"""Models: transformers architectures, named by config, counted without torch, built and saved as Hugging Face folders."""
