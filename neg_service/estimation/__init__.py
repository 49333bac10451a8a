"""How linear neurons are, and how well NEG is estimated: what runs of several measures say together."""
