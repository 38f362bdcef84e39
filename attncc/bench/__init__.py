"""attncc beside what else computes the same attention, in turns: what `attncc bench` runs."""
