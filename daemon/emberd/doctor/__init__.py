"""Why the model is cold, dead or refused: looks that gather facts, and the conditions that follow from them."""
