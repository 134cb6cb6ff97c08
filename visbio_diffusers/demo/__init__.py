"""A page in the browser to try a model on: `visbio demo`, and the same as a Hugging Face Space."""
