"""Models on the Hub: the card, and the upload."""
