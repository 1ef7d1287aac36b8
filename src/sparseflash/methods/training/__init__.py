"""Methods for training (and prefill): the selection is part of the model."""
