"""What goes to the Hugging Face Hub with a model."""
